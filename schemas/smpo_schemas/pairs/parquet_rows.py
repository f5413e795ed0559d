"""Read rows of Parquet files, a few at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import arrow_source, file_size, reading_parquet
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.normalising import PairRejectedError
from smpo_schemas.pairs.raw_rows import RawRow, RowRange, Scan
from smpo_schemas.reject_kinds import RejectKind

_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20

_MAX_ROWS_PER_BYTE = 1000
"""A Parquet file whose footer claims more rows per byte is refused: slicing absurdly many rows would fill the memory. A
file of equal rows has 120."""


def scan(path: AnyPath) -> Scan:
    """Read a file's footer.

    Raises:
        UserError: it is damaged.
    """
    with reading_parquet(path):
        size = file_size(path)
        footer = pq.read_metadata(arrow_source(path))
        groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        if sum(groups) != footer.num_rows or min(groups, default=0) < 0:
            raise UserError(
                f"{path} is damaged: its row groups do not have the {footer.num_rows} rows of its footer; "
                "download or write it again"
            )
        if footer.num_rows > _MAX_ROWS_PER_BYTE * size:
            raise UserError(f"{path} is damaged: it cannot hold the {footer.num_rows} rows that its footer claims")
        return Scan(footer.num_rows, size, _digest(path), list(pq.read_schema(arrow_source(path)).names))


def _digest(path: AnyPath) -> str:
    """Hex SHA-256 of the footer.

    A Parquet file contains its images and is large, but its footer is some kilobytes and has the offset, compressed
    size and statistics of every column of every row group, which hardly any other content shares. Images that change
    under the same footer are noticed where they are compared by hash (:func:`smpo_schemas.pairs.image_id`).
    """
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)  # the footer's length in 4 bytes, then the magic number
        file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def rows(part: RowRange, names: Sequence[str], further: Sequence[str] = ()) -> Iterator[RawRow]:
    """Yield the rows of a range, in order.

    Args:
        part: the range, and its file.
        names: columns to read; ``a.b`` is the field b of a struct a.
        further: columns whose value becomes None where Python cannot hold it.

    Raises:
        UserError: the file as a whole cannot be read.
    """
    # By default pyarrow reads all columns of a row group before it returns the first row, and keeps them.
    options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES}
    with reading_parquet(part.path), pq.ParquetFile(arrow_source(part.path), **options) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            start, stop = max(part.start, first), min(part.stop, first + count)
            if start < stop:
                yield from _group_rows(file, group, names, further, start - first, stop - first)
            first += count


def _group_rows(
    file: pq.ParquetFile, group: int, names: Sequence[str], further: Sequence[str], start: int, stop: int
) -> Iterator[RawRow]:
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


def _row(batch: pa.RecordBatch, index: int, further: Sequence[str]) -> RawRow:
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
