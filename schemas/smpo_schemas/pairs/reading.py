"""Read pairs: rows of files, by their format and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from smpo_common.store_path import AnyPath
from smpo_schemas.pairs import json_rows, parquet_rows, tar_rows
from smpo_schemas.pairs.layout import Layout, ListedLayout
from smpo_schemas.pairs.normalising import Pair, PairRejectedError, prompt_of
from smpo_schemas.pairs.raw_rows import RawRow, RowRange, Scan


@dataclass(frozen=True)
class RowFormat:
    """Functions that read one format; see ``scan`` and ``rows`` of :mod:`smpo_schemas.pairs.parquet_rows`."""

    scan: Callable[[AnyPath], Scan]
    rows: Callable[[RowRange, Sequence[str], Sequence[str]], Iterator[RawRow]]


FORMATS = {
    ".parquet": RowFormat(parquet_rows.scan, parquet_rows.rows),
    ".jsonl": RowFormat(json_rows.scan, json_rows.rows),
    ".json": RowFormat(json_rows.scan, json_rows.rows),
    ".tar": RowFormat(tar_rows.scan, tar_rows.rows),
}
"""Formats by the end of a file's name."""


def column_names(path: AnyPath) -> list[str]:
    """List the columns of a file; for JSON, the keys that occur in any row."""
    return list(FORMATS[path.suffix].scan(path).names)


def read_rows(
    rows: RowRange, layout: Layout, further: Sequence[str] = ()
) -> Iterator[tuple[str, Pair | PairRejectedError]]:
    """Yield ``(source, pair or error)`` for each row, in order; ``source`` is ``path:row``.

    Args:
        rows: the rows, and their file.
        layout: layout of the file.
        further: names of other columns, for :attr:`Pair.further`, besides the layout's own; a value that Python cannot
            hold is None.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    for number, row in enumerate(raw_rows(rows, layout, layout.needs, further), start=rows.start):
        source = f"{rows.path}:{number}"
        try:
            yield source, row if isinstance(row, PairRejectedError) else layout.pair(row, further)
        except PairRejectedError as reason:
            yield source, reason


def read_prompts(rows: RowRange, layout: Layout) -> Iterator[str]:
    """Yield the prompts of the rows that have one, without reading their images.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    for row in raw_rows(rows, layout, [layout.columns.prompt]):
        with suppress(PairRejectedError):
            if not isinstance(row, PairRejectedError):
                yield prompt_of(row, layout.columns)


def raw_rows(rows: RowRange, layout: Layout, names: Sequence[str], further: Sequence[str] = ()) -> Iterator[RawRow]:
    """Yield the rows of a range, from the layout's table of pairs if it has one, else from the file."""
    if isinstance(layout, ListedLayout):
        return layout.listed_rows(rows)
    return FORMATS[rows.path.suffix].rows(rows, names, further)
