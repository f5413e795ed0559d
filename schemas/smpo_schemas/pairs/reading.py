"""Rows of Parquet and JSONL files, a few at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.files import arrow_source, reading_parquet
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.normalising import Pair, PairRejectedError, normalise

_ROWS_READ = 16

_BYTES_READ = 1 << 20

MAX_LINE_BYTES = 64 << 20
"""A longer line of a JSONL file is not read; its row is rejected."""


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` (included) to ``stop`` (excluded) of one input file.

    ``near`` is a row at ``start`` or before it and the byte at which it begins: a JSONL file is read from there on.
    """

    path: AnyPath
    start: int
    stop: int
    near: tuple[int, int] = (0, 0)


def column_names(path: AnyPath) -> list[str]:
    """Names of a pair file's columns (JSONL: the keys of any of its rows, which need not all have the same)."""
    if path.suffix == ".parquet":
        with reading_parquet(path):
            return list(pq.read_schema(arrow_source(path)).names)
    return list(dict.fromkeys(key for row in _jsonl_rows(RowRange(path, 0, sys.maxsize)) for key in row))


def read_rows(rows: RowRange, columns: PairColumns) -> Iterator[tuple[str, Pair | PairRejectedError]]:
    """Yield ``(source, pair or the reason why it is none)`` for each row, in order; ``source`` is ``path:row``.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    for number, row in enumerate(_raw_rows(rows, columns), start=rows.start):
        source = f"{rows.path}:{number}"
        try:
            yield source, row if isinstance(row, PairRejectedError) else normalise(row, columns, rows.path.parent)
        except PairRejectedError as reason:
            yield source, reason


def _raw_rows(rows: RowRange, columns: PairColumns) -> Iterator[Mapping[str, Any] | PairRejectedError]:
    if rows.path.suffix == ".jsonl":
        yield from _jsonl_rows(rows)
        return
    names = [name for name in (getattr(columns, field.name) for field in fields(columns)) if name]
    # By default all columns of a row group are fetched before its first row is given, and kept.
    reading = {"pre_buffer": False, "buffer_size": _BYTES_READ}
    with reading_parquet(rows.path), pq.ParquetFile(arrow_source(rows.path), **reading) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            start, stop = max(rows.start, first), min(rows.stop, first + count)
            if start < stop:
                yield from _group_rows(file, group, names, start - first, stop - first)
            first += count


def _group_rows(
    file: pq.ParquetFile, group: int, names: list[str], start: int, stop: int
) -> Iterator[Mapping[str, Any] | PairRejectedError]:
    """Rows of one row group, a few at a time: a group of images may be larger than a worker's memory.

    A page is read whole, and pyarrow writes pages of 1024 rows: of a smaller group, each column is a page.
    """
    number = 0
    for batch in file.iter_batches(batch_size=_ROWS_READ, row_groups=[group], columns=names):
        for index in range(batch.num_rows):
            if start <= number < stop:
                yield _row(batch, index)
            number += 1
        if number >= stop:
            return
    raise ValueError(f"row group {group} ends after {number} rows, before row {stop} of its footer")


def _row(batch: pa.RecordBatch, index: int) -> Mapping[str, Any] | PairRejectedError:
    """One row; some values that a file can hold are none in Python (text that is not UTF-8, the year 300,000)."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except (ValueError, OverflowError) as error:
            return PairRejectedError(f"value not readable: {name}: {error}")
    return row


def _jsonl_rows(rows: RowRange) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL file; a line that is not a JSON object yields an empty row, which is then rejected."""
    first, begin = rows.near
    with rows.path.open("rb") as file:
        file.seek(begin)
        for _, line in islice(json_lines(file), rows.start - first, rows.stop - first):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # RecursionError: nested deeper than any row
                row = {}
            yield row if isinstance(row, dict) else {}


def json_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, each with the byte at which it begins (counted from where ``file`` stands).

    Of one above :data:`MAX_LINE_BYTES` nothing is given but a word that is no JSON.
    """
    begin = 0
    while line := file.readline(MAX_LINE_BYTES):
        end = begin + len(line)
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = b"overlong"
            while rest := file.readline(MAX_LINE_BYTES):
                end += len(rest)
                if rest.endswith(b"\n"):
                    break
        if line.strip():
            yield begin, line
        begin = end
