"""List the files of ``--pairs``, count their rows and slice them into units."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import arrow_source, files_below, read_all, reading_parquet, sha256_file
from smpo_common.store_path import AnyPath
from smpo_schemas.candidates import without_rejects
from smpo_schemas.pairs.columns import PairColumns, resolve_columns
from smpo_schemas.pairs.normalising import is_unicode
from smpo_schemas.pairs.reading import RowRange, column_names, json_lines

PAIR_SUFFIXES = (".parquet", ".jsonl")

_MARK_EVERY = 1024
"""The byte offset of every 1024th JSONL row is recorded, so that a slice can seek to its start."""

_MAX_ROWS_PER_BYTE = 1000
"""A Parquet file whose footer claims more rows per byte is refused: slicing absurdly many rows would fill the memory. A
file of equal rows has 120."""


@dataclass(frozen=True)
class PairFile:
    """One input file: its numbers of rows and bytes, and a hash of its content (:func:`_digest`).

    ``offsets`` are the byte offsets of rows 0, 1024, 2048, ... of a JSONL file.
    """

    path: AnyPath
    rows: int
    bytes: int
    digest: str
    offsets: Sequence[int] = ()


def list_pair_files(paths: Sequence[AnyPath], flag: str = "--pairs") -> list[PairFile]:
    """List the Parquet and JSONL files in ``paths`` (files or folders) that have rows, sorted by path within each.

    The listed paths are absolute, since workers have other working directories. ``flag`` named them, for errors.

    Raises:
        UserError: a path does not exist, has no such file, or a file cannot be read.
    """
    files: list[AnyPath] = []
    for path in paths:
        if path.is_dir():
            inside = find_pair_files(path.absolute())
            if not inside:
                raise UserError(f"{flag} {path}: no .parquet or .jsonl file in this folder (hidden ones are skipped)")
            files.extend(inside)
        elif path.is_file() and path.suffix in PAIR_SUFFIXES:
            files.append(path.absolute())
        elif path.exists():
            raise UserError(f"{flag} {path}: give .parquet or .jsonl files")
        else:
            raise UserError(f"{flag} {path} does not exist")
    _refuse_repeated(files, flag)
    for path in files:
        if not is_unicode(str(path)):
            raise UserError(f"{flag} {path}: the name is not valid Unicode; rename the file")
    with_rows = [file for file in read_all(_describe, files) if file.rows]
    if not with_rows:
        raise UserError(f"{flag} {paths[0]}: no rows in any file")
    return with_rows


def find_pair_files(folder: AnyPath) -> list[AnyPath]:
    """List the Parquet and JSONL files in a folder and its subfolders; see :func:`smpo_common.files.files_below`.

    Raises:
        UserError: a folder cannot be listed, or holds an unfinished run of ``generate``.
    """
    return [path for path in without_rejects(files_below(folder)) if path.suffix in PAIR_SUFFIXES]


def _refuse_repeated(files: Sequence[AnyPath], flag: str) -> None:
    """Refuse a file with several names, whose pairs would count several times."""
    names: dict[AnyPath, AnyPath] = {}
    for path in files:
        real = path.resolve() if isinstance(path, Path) else path
        first = names.setdefault(real, path)
        if first is not path:
            raise UserError(f"{flag} has the same file twice: {first} and {path}")


def _describe(path: AnyPath) -> PairFile:
    if path.suffix == ".parquet":
        with reading_parquet(path):
            size = path.stat().st_size
            footer = pq.read_metadata(arrow_source(path))
            groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            if sum(groups) != footer.num_rows or min(groups, default=0) < 0:
                raise UserError(
                    f"{path} is damaged: its row groups do not have the {footer.num_rows} rows of its footer; "
                    "download or write it again"
                )
            if footer.num_rows > _MAX_ROWS_PER_BYTE * size:
                raise UserError(f"{path} is damaged: it cannot hold the {footer.num_rows} rows that its footer claims")
            return PairFile(path, footer.num_rows, size, _digest(path))
    try:
        with path.open("rb") as file:
            offsets, rows = [], 0
            for rows, (offset, _) in enumerate(json_lines(file), start=1):
                if rows % _MARK_EVERY == 1:
                    offsets.append(offset)
            return PairFile(path, rows, path.stat().st_size, _digest(path), offsets)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _digest(path: AnyPath) -> str:
    """Hex SHA-256 of a JSONL file, or of a Parquet file's footer.

    A JSONL file is small (its images are paths) and is read to count its rows anyway. A Parquet file contains its
    images and is large, but its footer is some kilobytes and has the offset, compressed size and statistics of every
    column of every row group, which hardly any other content shares. Images that change under the same footer are
    noticed where they are compared by hash (:func:`image_id`).
    """
    if path.suffix != ".parquet":
        return sha256_file(path)
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)  # the footer's length in 4 bytes, then the magic number
        file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def columns_of(files: Sequence[PairFile], given: Mapping[str, str | None]) -> dict[AnyPath, PairColumns]:
    """Resolve the columns of each file; see :func:`resolve_columns`."""
    paths = [file.path for file in files]
    names_of_files = read_all(column_names, paths)
    return {path: resolve_columns(names, given, path) for path, names in zip(paths, names_of_files, strict=True)}


def slice_files(files: Sequence[PairFile], rows_per_slice: int, limit: int | None = None) -> list[list[RowRange]]:
    """Slice the first ``limit`` rows of the input, in file order, into units of ``rows_per_slice`` rows.

    The last slice may be shorter. Slices depend on the listing and these two numbers alone.
    """
    slices: list[list[RowRange]] = []
    current: list[RowRange] = []
    room = rows_per_slice
    left = sum(file.rows for file in files) if limit is None else limit
    for file in files:
        start = 0
        while start < file.rows and left > 0:
            stop = min(file.rows, start + room, start + left)
            mark = start // _MARK_EVERY
            seek_to = (mark * _MARK_EVERY, file.offsets[mark]) if file.offsets else (0, 0)
            current.append(RowRange(file.path, start, stop, seek_to))
            room -= stop - start
            left -= stop - start
            start = stop
            if room == 0:
                slices.append(current)
                current, room = [], rows_per_slice
    if current:
        slices.append(current)
    return slices
