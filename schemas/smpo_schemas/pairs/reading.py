"""Read rows of Parquet and JSONL files, a few at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.files import arrow_source, reading_parquet
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.normalising import Pair, PairRejectedError, normalise, prompt_of
from smpo_schemas.reject_kinds import RejectKind

_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20

MAX_LINE_BYTES = 64 << 20
"""A longer line of a JSONL file is not read; its row is rejected."""


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` (included) to ``stop`` (excluded) of one input file.

    ``seek_to`` is a row not after ``start`` and its byte offset, from which a JSONL file is read.
    """

    path: AnyPath
    start: int
    stop: int
    seek_to: tuple[int, int] = (0, 0)


def column_names(path: AnyPath) -> list[str]:
    """List the columns of a file; for JSONL, the keys that occur in any row."""
    if path.suffix == ".parquet":
        with reading_parquet(path):
            return list(pq.read_schema(arrow_source(path)).names)
    return list(dict.fromkeys(key for row in _jsonl_rows(RowRange(path, 0, sys.maxsize)) for key in row))


def read_rows(
    rows: RowRange, columns: PairColumns, further: Sequence[str] = ()
) -> Iterator[tuple[str, Pair | PairRejectedError]]:
    """Yield ``(source, pair or error)`` for each row, in order; ``source`` is ``path:row``.

    Args:
        rows: of which file.
        columns: of the file.
        further: names of other columns, for :attr:`Pair.further`; a value that Python cannot hold is None.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    for number, row in enumerate(_raw_rows(rows, columns, further), start=rows.start):
        source = f"{rows.path}:{number}"
        try:
            if isinstance(row, PairRejectedError):
                yield source, row
            else:
                pair = normalise(row, columns, rows.path.parent)
                yield source, replace(pair, further={name: row.get(name) for name in further}) if further else pair
        except PairRejectedError as reason:
            yield source, reason


def read_prompts(rows: RowRange, columns: PairColumns) -> Iterator[str]:
    """Yield the prompts of the rows that have one, without reading their images.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    prompt = PairColumns(prompt=columns.prompt, image_0=None, image_1=None)
    for row in _raw_rows(rows, prompt):
        with suppress(PairRejectedError):
            if not isinstance(row, PairRejectedError):
                yield prompt_of(row, prompt)


def _raw_rows(
    rows: RowRange, columns: PairColumns, further: Sequence[str] = ()
) -> Iterator[Mapping[str, Any] | PairRejectedError]:
    if rows.path.suffix == ".jsonl":
        yield from _jsonl_rows(rows)
        return
    names = [name for name in (getattr(columns, field.name) for field in fields(columns)) if name]
    # By default pyarrow reads all columns of a row group before it returns the first row, and keeps them.
    options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES}
    with reading_parquet(rows.path), pq.ParquetFile(arrow_source(rows.path), **options) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            start, stop = max(rows.start, first), min(rows.stop, first + count)
            if start < stop:
                yield from _group_rows(file, group, names, further, start - first, stop - first)
            first += count


def _group_rows(
    file: pq.ParquetFile, group: int, names: Sequence[str], further: Sequence[str], start: int, stop: int
) -> Iterator[Mapping[str, Any] | PairRejectedError]:
    """Yield rows of one row group, in small batches: a group of images may be larger than a worker's memory.

    A page is always read whole, and pyarrow writes pages of 1024 rows: in a smaller group, each column is one page.
    """
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=[*names, *further]):
        for index in range(batch.num_rows):
            if start <= number < stop:
                yield _row(batch, index, further)
            number += 1
        if number >= stop:
            return
    raise ValueError(f"row group {group} ends after {number} rows, before row {stop} of its footer")


def _row(batch: pa.RecordBatch, index: int, further: Sequence[str]) -> Mapping[str, Any] | PairRejectedError:
    """Convert one row to Python, which cannot hold some values (text that is not UTF-8, the year 300,000)."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except (ValueError, OverflowError) as error:
            if name in further:
                row[name] = None
            else:
                return PairRejectedError(f"{RejectKind.VALUE_NOT_READABLE}: {name}: {error}")
    return row


def _jsonl_rows(rows: RowRange) -> Iterator[Mapping[str, Any]]:
    """Yield rows of a JSONL file; a line that is not a JSON object yields an empty row, which is then rejected."""
    first, offset = rows.seek_to
    with rows.path.open("rb") as file:
        file.seek(offset)
        for _, line in islice(json_lines(file), rows.start - first, rows.stop - first):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # RecursionError: a hostile line, nested too deep
                row = {}
            yield row if isinstance(row, dict) else {}


def json_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the byte offset, from the file's current position, and the content of each line that is not blank.

    A line over :data:`MAX_LINE_BYTES` is skipped; invalid JSON is yielded in its place, so that its row is rejected.
    """
    offset = 0
    while line := file.readline(MAX_LINE_BYTES):
        end = offset + len(line)
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = b"overlong"
            while rest := file.readline(MAX_LINE_BYTES):
                end += len(rest)
                if rest.endswith(b"\n"):
                    break
        if line.strip():
            yield offset, line
        offset = end
