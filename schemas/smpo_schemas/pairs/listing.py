"""List the files of ``--pairs``, recognise their layouts, count their rows and slice them into units."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from smpo_common.errors import UserError
from smpo_common.files import files_below, read_all
from smpo_common.store_path import AnyPath, StorePath
from smpo_schemas import layouts
from smpo_schemas.generation.candidates import without_rejects
from smpo_schemas.pairs.layout import FolderLayout, Layout, ListedLayout, ReadingChoices
from smpo_schemas.pairs.normalising import PairRejectedError, is_unicode, value_of
from smpo_schemas.pairs.raw_rows import MARK_EVERY, NotRowsError, RawRow, RowRange
from smpo_schemas.pairs.reading import FORMATS, raw_rows

PAIR_SUFFIXES = tuple(FORMATS)

_SURE_SUFFIXES = (".parquet", ".jsonl")
"""Formats whose files in a folder must hold pairs. Files of other formats are left out if they hold something else."""

_PROBED_ROWS = 8
"""Number of first rows whose images are looked for, to find the folder that image paths are relative to."""


@dataclass(frozen=True)
class PairFile:
    """One input file, or a folder of images.

    Attributes:
        path: path of the file or folder.
        rows: number of its rows, each of which is a pair or rejected.
        bytes: its size.
        digest: hash of its content, or of a part that identifies the content in practice.
        offsets: byte offsets of rows 0, 1024, 2048, ... where its format needs them.
        layout: how its rows are read; None where only their number matters.
    """

    path: AnyPath
    rows: int
    bytes: int
    digest: str
    offsets: Sequence[int] = ()
    layout: Layout | None = None


def list_pair_files(
    paths: Sequence[AnyPath], choices: ReadingChoices | None = None, flag: str = "--pairs"
) -> list[PairFile]:
    """List the files in ``paths`` (files or folders) that have rows, sorted by path within each.

    The listed paths are absolute, since workers have other working directories.

    Args:
        paths: files or folders.
        choices: what flags say about reading them.
        flag: the flag that named the paths, for errors.

    Raises:
        UserError: a path does not exist, has no such file, or a file cannot be read.
    """
    choices = choices or ReadingChoices()
    found: list[_Found] = [each for path in expanded(paths) for each in _find(path, choices, flag)]
    _refuse_repeated([each.path for each in found], flag)
    for each in found:
        if not is_unicode(str(each.path)):
            raise UserError(f"{flag} {each.path}: the name is not valid Unicode; rename the file")
    described = read_all(partial(_describe_or_leave_out, choices=choices), found)
    with_rows = [file for file in described if isinstance(file, PairFile) and file.rows]
    if not with_rows:
        left_out = next((f"; {file}" for file in described if isinstance(file, str)), "")
        raise UserError(f"{flag} {paths[0]}: no rows in any file{left_out}")
    _refuse_unused(choices, layouts_of(with_rows))
    _refuse_two_forms(layouts_of(with_rows))
    return with_rows


def expanded(paths: Sequence[AnyPath]) -> list[AnyPath]:
    """Replace paths with ``*``, ``?`` or ``[`` that do not exist by those that match; ``**`` matches any folders.

    A pattern that nothing matches stays.
    """
    found: list[AnyPath] = []
    for path in paths:
        matching = [] if not glob.has_magic(str(path)) or path.exists() else _matching(path)
        found += matching or [path]
    return found


def _matching(path: AnyPath) -> list[AnyPath]:
    if isinstance(path, StorePath):
        return sorted(path.parent.glob(path.name))
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  (absolute patterns)


@dataclass(frozen=True)
class _Found:
    """A file, or a folder with its layout; ``sure``: whether it must hold pairs."""

    path: AnyPath
    layout: FolderLayout | None = None
    sure: bool = True


def _find(path: AnyPath, choices: ReadingChoices, flag: str) -> list[_Found]:
    """Find what a path of the user stands for.

    Raises:
        UserError: nothing that may hold pairs.
    """
    if path.is_dir():
        found = _find_in_folder(path.absolute(), choices)
        if not found:
            raise UserError(f"{flag} {path}: no {_suffixes()} file in this folder (hidden ones are skipped)")
        return found
    if path.is_file() and path.suffix in PAIR_SUFFIXES:
        return [_Found(path.absolute())]
    raise UserError(f"{flag} {path}: give {_suffixes()} files" if path.exists() else f"{flag} {path} does not exist")


def holds_pairs(folder: AnyPath) -> bool:
    """Whether a folder has files that may hold pairs, or images in a known layout.

    Raises:
        UserError: a folder cannot be listed, or holds an unfinished run of ``generate``.
    """
    return bool(_find_in_folder(folder, ReadingChoices()))


def _find_in_folder(folder: AnyPath, choices: ReadingChoices) -> list[_Found]:
    own = layouts.folder_layout_of(folder, choices)
    if own:
        return [_Found(folder, own)]
    paths = [path for path in without_rejects(files_below(folder)) if path.suffix in PAIR_SUFFIXES]
    files = [_Found(path, sure=path.suffix in _SURE_SUFFIXES) for path in paths]
    if files:
        return files
    inside = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    found = [_Found(entry, layouts.folder_layout_of(entry, choices)) for entry in sorted(inside)]
    return [each for each in found if each.layout]


def layouts_of(files: Sequence[PairFile]) -> dict[AnyPath, Layout]:
    """Return the layout of each file."""
    return {file.path: file.layout for file in files if file.layout}


def _suffixes() -> str:
    return f"{', '.join(PAIR_SUFFIXES[:-1])} or {PAIR_SUFFIXES[-1]}"


def _refuse_repeated(files: Sequence[AnyPath], flag: str) -> None:
    """Refuse a file with several names, whose pairs would count several times."""
    names: dict[AnyPath, AnyPath] = {}
    for path in files:
        real = path.resolve() if isinstance(path, Path) else path
        first = names.setdefault(real, path)
        if first is not path:
            raise UserError(f"{flag} has the same file twice: {first} and {path}")


def _refuse_unused(choices: ReadingChoices, found: Mapping[AnyPath, Layout]) -> None:
    """Refuse a choice that no file's layout takes into account."""
    for name in ("axis", "min_confidence"):
        if getattr(choices, name) is not None and not any(name in layout.uses for layout in found.values()):
            names = ", ".join(sorted({layout.name for layout in found.values()}))
            users = ", ".join(kind.name for kind in layouts.layouts().values() if name in kind.uses)
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} has no effect on the layout {names}; it is for {users}")


def _refuse_two_forms(found: Mapping[AnyPath, Layout]) -> None:
    """Refuse a data set that holds its pairs twice, in two formats."""
    first: dict[str, AnyPath] = {}
    for path, layout in found.items():
        other = first.setdefault(layout.name, path)
        if layout.in_two_formats and other.suffix != path.suffix:
            raise UserError(
                f"{other} and {path} may hold the same pairs; give files of one format, such as '*.parquet'"
            )


def _describe_or_leave_out(found: _Found, choices: ReadingChoices) -> PairFile | str:
    """Describe a file; in a folder, say why a file that may be something else is left out."""
    if found.layout:
        return _list(found.path, found.layout, iter(()))
    try:
        scan = FORMATS[found.path.suffix].scan(found.path)
    except NotRowsError as error:
        if found.sure:
            raise
        return str(error)
    try:
        layout = layouts.layout_of(found.path, scan.names, choices)
    except UserError as error:
        if found.sure and scan.rows:
            raise
        return str(error)
    rows = RowRange(found.path, 0, scan.rows)
    if isinstance(layout, ListedLayout):
        return _list(found.path, layout, FORMATS[found.path.suffix].rows(rows, layout.needs, ()))
    layout.folder = _folder_of_images(rows, layout)
    return PairFile(found.path, scan.rows, scan.bytes, scan.digest, scan.offsets, layout)


def _list(path: AnyPath, layout: ListedLayout, rows: Iterator[RawRow]) -> PairFile:
    """List the pairs of a file's rows, or of a folder; the digest is that of the list."""
    layout.table = layout.list_pairs(rows)
    content = hashlib.sha256()
    for row in layout.table.to_pylist():
        content.update(json.dumps(row).encode())
    count = layout.table.num_rows
    layout.folder = _folder_of_images(RowRange(path, 0, count), layout)
    return PairFile(path, count, layout.table.nbytes, content.hexdigest(), (), layout)


def _folder_of_images(rows: RowRange, layout: Layout) -> AnyPath:
    """Return the first folder that has an image of the first rows, or the layout's first choice."""
    folders = layout.image_folders()
    if len(folders) > 1:
        first = RowRange(rows.path, 0, min(rows.stop, _PROBED_ROWS))
        for row in raw_rows(first, layout, layout.needs):
            for folder in folders:
                if not isinstance(row, PairRejectedError) and _has_image(row, layout, folder):
                    return folder
    return folders[0]


def _has_image(row: Mapping[str, object], layout: Layout, folder: AnyPath) -> bool:
    try:
        row = layout.convert(row)
    except PairRejectedError:
        return False
    at = layout.columns
    values = (value_of(row, name) for name in (at.chosen, at.rejected, at.image_0, at.image_1) if name)
    try:
        return any(isinstance(value, str) and (folder / value).is_file() for value in values)
    except (OSError, ValueError):  # a name that no file can have
        return False


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
            mark = start // MARK_EVERY
            seek_to = (mark * MARK_EVERY, file.offsets[mark]) if file.offsets else (0, 0)
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
