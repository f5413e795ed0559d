"""Preference pairs: the input of the pipeline, read as they are and normalised row by row."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.errors import UserError, one_line
from smpo_common.files import arrow_source, files_below, read_all, reading_parquet, sha256_file
from smpo_common.retry import PASSING_ERRNOS
from smpo_common.store_path import AnyPath

PAIR_SUFFIXES = (".parquet", ".jsonl")
_ROWS_READ = 16
_BYTES_READ = 1 << 20

_ROWS_APART = 1024
"""Of a JSONL file it is noted where every so-manieth row begins."""

MAX_TEXT = 100_000
"""Characters of a longer prompt, id or annotator's name are nobody's text: the row is rejected."""

MAX_IMAGE_BYTES = 256 << 20
"""Larger image files are rejected, before they are read where a path names them."""

MAX_LINE_BYTES = 64 << 20
"""A longer line of a JSONL file is not read; its row is rejected."""

_ROWS_PER_BYTE = 1000
"""A Parquet file whose footer claims more rows than this for each of its bytes is refused: cutting the claimed rows
into units would fill the memory. A file of equal rows comes to 120."""


class PairRejectedError(Exception):
    """A row that cannot become a pair; the message is the reason that the rejects table records.

    Attributes:
        pair_id: what its id column says, or None where there is none or it is no text.
    """

    def __init__(self, reason: str, pair_id: str | None = None) -> None:
        super().__init__(one_line(reason))
        self.pair_id = pair_id


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt, and what an annotator said of them.

    Attributes:
        pair_id: stable name; all of a pair's randomness comes from it and a run's seed.
        prompt: the text both images were made for.
        image_0, image_1: encoded image files, as bytes.
        label: the annotator's P(image_0 preferred): 1, 0, or 0.5 for a tie; None where nobody labelled.
        annotator: who labelled it, or None.
    """

    pair_id: str
    prompt: str
    image_0: bytes
    image_1: bytes
    label: float | None
    annotator: str | None


@dataclass(frozen=True)
class PairColumns:
    """Which input column holds what; ``pair_id``, ``label`` and ``annotator`` are optional (None: not there).

    A row whose ``pair_id`` is null, NaN or blank has none.

    Image columns hold bytes, a struct with ``bytes``/``path`` (as the datasets library writes), or a path that is
    relative to the folder of the file it stands in.
    """

    prompt: str = "prompt"
    image_0: str = "image_0"
    image_1: str = "image_1"
    label: str | None = None
    pair_id: str | None = None
    annotator: str | None = None


PICK_A_PIC = PairColumns("caption", "jpg_0", "jpg_1", "label_0", "ranking_id", "user_id")
"""Pick-a-Pic v2's own column names."""

_KNOWN_OPTIONAL = PairColumns(label="label", pair_id="pair_id", annotator="annotator")


def resolve_columns(names: Sequence[str], given: Mapping[str, str | None], path: AnyPath) -> PairColumns:
    """Decide which columns of a file are used: Pick-a-Pic's where they are there, else the normalised names.

    Args:
        names: the file's column names.
        given: names chosen by flags, by field of :class:`PairColumns`; None or missing means not chosen.
        path: the file, for the error.

    Raises:
        UserError: a column that is needed, or that a flag names, is not in the file.
    """
    preset = PICK_A_PIC if {PICK_A_PIC.image_0, PICK_A_PIC.image_1} <= set(names) else _KNOWN_OPTIONAL
    chosen: dict[str, str | None] = {}
    for field in fields(PairColumns):
        flagged = given.get(field.name)
        name = flagged or getattr(preset, field.name)
        optional = field.name in ("label", "pair_id", "annotator")
        if name not in names:
            if flagged or not optional:
                flag = "--" + field.name.replace("_", "-") + "-column"
                raise UserError(f"{path} has no column {name!r} (it has: {', '.join(names)}); name it with {flag}")
            name = None
        if list(names).count(str(name)) > 1:
            raise UserError(f"{path} has several columns {name!r}: which one is meant?")
        chosen[field.name] = name
    return PairColumns(**chosen)  # type: ignore[arg-type]


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


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` (included) to ``stop`` (excluded) of one input file.

    ``near`` is a row at ``start`` or before it and the byte at which it begins: a JSONL file is read from there on.
    """

    path: AnyPath
    start: int
    stop: int
    near: tuple[int, int] = (0, 0)


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
        if not _is_unicode(str(path)):
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
            for rows, (begin, _) in enumerate(_lines(file), start=1):
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


def column_names(path: AnyPath) -> list[str]:
    """Names of a pair file's columns (JSONL: the keys of any of its rows, which need not all have the same)."""
    if path.suffix == ".parquet":
        with reading_parquet(path):
            return list(pq.read_schema(arrow_source(path)).names)
    return list(dict.fromkeys(key for row in _jsonl_rows(RowRange(path, 0, sys.maxsize)) for key in row))


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
        for _, line in islice(_lines(file), rows.start - first, rows.stop - first):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # RecursionError: nested deeper than any row
                row = {}
            yield row if isinstance(row, dict) else {}


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
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


def normalise(row: Mapping[str, Any], columns: PairColumns, folder: AnyPath) -> Pair:
    """Turn one input row into a :class:`Pair`.

    Raises:
        PairRejectedError: a field is missing or of the wrong kind.
    """
    pair_id = _text(row, columns.pair_id, "pair_id")
    try:
        return _pair(row, columns, folder, pair_id)
    except PairRejectedError as error:
        raise PairRejectedError(str(error), pair_id) from error


def _pair(row: Mapping[str, Any], columns: PairColumns, folder: AnyPath, pair_id: str | None) -> Pair:
    if not isinstance(row.get(columns.prompt), str):
        raise PairRejectedError(f"no text: prompt column {columns.prompt!r} is empty or of another type")
    prompt = _text(row, columns.prompt, "prompt") or ""
    images = [_image_bytes(row.get(name), name, folder) for name in (columns.image_0, columns.image_1)]
    return Pair(
        pair_id=_content_id(prompt, *images) if pair_id is None else pair_id,
        prompt=prompt,
        image_0=images[0],
        image_1=images[1],
        label=_label(row.get(columns.label)) if columns.label else None,
        annotator=_text(row, columns.annotator, "annotator"),
    )


def _text(row: Mapping[str, Any], column: str | None, what: str) -> str | None:
    """A value as text; None where there is none: null, NaN or blank."""
    value = row.get(column) if column else None
    # pandas writes NaN where a number is missing, and a CSV's empty cell may become an empty text.
    if value is None or (isinstance(value, str) and not value.strip()) or _is_nan(value):
        return None
    if isinstance(value, (list, dict)):
        raise PairRejectedError(f"{what} is no text: {type(value).__name__}")
    text = str(value)
    if len(text) > MAX_TEXT:
        raise PairRejectedError(f"{what} too long: {len(text)} characters, above {MAX_TEXT}")
    if not _is_unicode(text):
        raise PairRejectedError(f"{what} is not valid Unicode")
    return text


def _is_unicode(text: str) -> bool:
    """Whether a file can hold a text: half surrogate pairs, which Python and JSON can, are none of UTF-8's."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _image_bytes(value: object, name: str, folder: AnyPath) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = _file_bytes(folder / value, name)
    if not isinstance(value, bytes) or not value:
        raise PairRejectedError(f"no image: {name} holds no bytes and no path")
    if len(value) > MAX_IMAGE_BYTES:
        raise PairRejectedError(f"image too large: {name} has {len(value)} bytes, above {MAX_IMAGE_BYTES}")
    return value


def _file_bytes(path: AnyPath, name: str) -> bytes:
    """The content of a plain file; a device or a pipe may have no end, or wait for ever, and is not opened."""
    shown = repr(str(path)[-200:])
    try:
        size = path.stat().st_size
        if not path.is_file() or not size:
            raise PairRejectedError(f"image not readable: {name} {shown}: no plain file, or empty")
        if size > MAX_IMAGE_BYTES:
            raise PairRejectedError(f"image too large: {name} {shown} has {size} bytes, above {MAX_IMAGE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        if error.errno in PASSING_ERRNOS:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        # An object store's error for a missing file has no words.
        reason = error.strerror or "no such file"
        raise PairRejectedError(f"image not readable: {name} {shown}: {reason}") from error
    except ValueError as error:  # a name that no file can have
        raise PairRejectedError(f"image not readable: {name} {shown}: {error}") from error


def image_id(data: bytes) -> str:
    """Name an image by its encoded file: equal bytes, equal name, whatever pair it stands in."""
    return hashlib.sha256(data).hexdigest()[:32]


def _label(value: object) -> float | None:
    if value is None or _is_nan(value):
        return None
    if isinstance(value, (int, float)) and 0 <= value <= 1:
        return float(value)
    raise PairRejectedError(f"bad label: {value!r} is not a number from 0 to 1")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _content_id(prompt: str, image_0: bytes, image_1: bytes) -> str:
    """Name a pair by what it holds; lengths keep the three parts apart."""
    digest = hashlib.sha256()
    for part in (prompt.encode(), image_0, image_1):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]
