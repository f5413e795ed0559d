"""The files of ``--pairs``, what they hold, and their slices."""

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
from smpo_schemas.pairs.columns import PairColumns, resolve_columns
from smpo_schemas.pairs.normalising import is_unicode
from smpo_schemas.pairs.reading import RowRange, column_names, json_lines

PAIR_SUFFIXES = (".parquet", ".jsonl")

_ROWS_APART = 1024
"""Of a JSONL file it is noted where every so-manieth row begins."""

_ROWS_PER_BYTE = 1000
"""A Parquet file whose footer claims more rows than this for each of its bytes is refused: cutting the claimed rows
into units would fill the memory. A file of equal rows comes to 120."""


@dataclass(frozen=True)
class PairFile:
    """One input file, how many rows and bytes it has, and a digest of what it holds (:func:`_digest`).

    ``begins`` are the bytes at which its rows 0, 1024, 2048, ... begin, if it is a JSONL file.
    """

    path: AnyPath
    rows: int
    bytes: int
    digest: str
    begins: Sequence[int] = ()


def list_pair_files(paths: Sequence[AnyPath]) -> list[PairFile]:
    """Find the Parquet and JSONL files under ``paths`` (files or folders), sorted by path within each.

    The paths found are absolute: workers on other machines stand in other folders.

    Raises:
        UserError: a path does not exist, holds no such file, or a file cannot be read.
    """
    files: list[AnyPath] = []
    for path in paths:
        if path.is_dir():
            found = find_pair_files(path.absolute())
            if not found:
                raise UserError(
                    f"--pairs {path}: no .parquet or .jsonl file in this folder (hidden ones are not looked at)"
                )
            files.extend(found)
        elif path.is_file() and path.suffix in PAIR_SUFFIXES:
            files.append(path.absolute())
        elif path.exists():
            raise UserError(f"--pairs {path}: only .parquet and .jsonl files are read")
        else:
            raise UserError(f"--pairs {path} does not exist")
    _refuse_repeated(files)
    for path in files:
        if not is_unicode(str(path)):
            raise UserError(f"--pairs {path}: this name cannot stand in a table; rename the file")
    counted = read_all(_describe, files)
    filled = [file for file in counted if file.rows]
    if not filled:
        raise UserError(f"--pairs {paths[0]}: no rows in any file")
    return filled


def find_pair_files(folder: AnyPath) -> list[AnyPath]:
    """The Parquet and JSONL files of a folder, as :func:`smpo_common.files.files_below` finds them."""
    return [path for path in files_below(folder) if path.suffix in PAIR_SUFFIXES]


def _refuse_repeated(files: Sequence[AnyPath]) -> None:
    """Refuse a file that several names lead to: each of its pairs would count as often."""
    names: dict[AnyPath, AnyPath] = {}
    for path in files:
        real = path.resolve() if isinstance(path, Path) else path
        first = names.setdefault(real, path)
        if first is not path:
            raise UserError(f"--pairs names the same file twice: {first} and {path}")


def _describe(path: AnyPath) -> PairFile:
    if path.suffix == ".parquet":
        with reading_parquet(path):
            size = path.stat().st_size
            footer = pq.read_metadata(arrow_source(path))
            groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            if sum(groups) != footer.num_rows or min(groups, default=0) < 0:
                raise UserError(
                    f"{path} is damaged: its row groups do not have the {footer.num_rows} rows of its footer"
                )
            if footer.num_rows > _ROWS_PER_BYTE * size:
                raise UserError(f"{path} is damaged: it cannot hold the {footer.num_rows} rows that its footer claims")
            return PairFile(path, footer.num_rows, size, _digest(path))
    try:
        with path.open("rb") as file:
            begins, rows = [], 0
            for rows, (begin, _) in enumerate(json_lines(file), start=1):
                if rows % _ROWS_APART == 1:
                    begins.append(begin)
            return PairFile(path, rows, path.stat().st_size, _digest(path), begins)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _digest(path: AnyPath) -> str:
    """Hex SHA-256 of a JSONL file, or of a Parquet file's footer.

    A JSONL file is small (its images are paths) and read whole anyway. A Parquet file holds its images; its footer has
    the offset, compressed size and statistics of every column of every row group, so that hardly any other content has
    the same one, and costs one read of some kilobytes. Bytes that change under an unchanged footer are noticed where
    images are compared by name (:func:`image_id`).
    """
    if path.suffix != ".parquet":
        return sha256_file(path)
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)  # the footer's length in 4 bytes, then the magic number
        file.seek(-8 - int.from_bytes(file.read(4), "little"), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def columns_of(files: Sequence[PairFile], given: Mapping[str, str | None]) -> dict[AnyPath, PairColumns]:
    """The columns that are used of each file; see :func:`resolve_columns`."""
    paths = [file.path for file in files]
    names = read_all(column_names, paths)
    return {path: resolve_columns(there, given, path) for path, there in zip(paths, names, strict=True)}


def slice_files(files: Sequence[PairFile], rows_per_slice: int, limit: int | None = None) -> list[list[RowRange]]:
    """Cut the input, in file order, into slices of ``rows_per_slice`` rows; the last one may be shorter.

    A slice is the unit of work and of commit. It depends on the listing and these two numbers alone.
    """
    slices: list[list[RowRange]] = []
    current: list[RowRange] = []
    room = rows_per_slice
    left = sum(file.rows for file in files) if limit is None else limit
    for file in files:
        start = 0
        while start < file.rows and left > 0:
            stop = min(file.rows, start + room, start + left)
            known = start // _ROWS_APART
            near = (known * _ROWS_APART, file.begins[known]) if file.begins else (0, 0)
            current.append(RowRange(file.path, start, stop, near))
            room -= stop - start
            left -= stop - start
            start = stop
            if room == 0:
                slices.append(current)
                current, room = [], rows_per_slice
    if current:
        slices.append(current)
    return slices
