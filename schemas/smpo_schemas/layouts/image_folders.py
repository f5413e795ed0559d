"""Folders of preferred and of other images, whose files have the same names, with captions beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import ClassVar

import pyarrow as pa

from smpo_common.errors import UserError
from smpo_common.files import files_below, read_all
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import FolderLayout
from smpo_schemas.pairs.normalising import is_unicode
from smpo_schemas.pairs.raw_rows import RawRow

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_CAPTIONS = (".txt", ".caption")
_FOLDERS = (("w", "l"), ("win", "lose"), ("winner", "loser"), ("chosen", "rejected"), ("preferred", "rejected"))
_SUFFIXES = ("_w", "_l")
_PAIRS = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")])
_COLUMNS = PairColumns(image_0=None, image_1=None, chosen="chosen", rejected="rejected")


class WinLoseFolders(FolderLayout):
    """``w/`` and ``l/`` with files of the same names, or similar pairs of folders.

    People request this layout for kohya's sd-scripts.
    """

    name: ClassVar[str] = "win-lose-folders"
    data_sets: ClassVar[str] = f"two folders, {', or '.join(f'`{win}/` and `{lose}/`' for win, lose in _FOLDERS)}"
    columns: PairColumns = _COLUMNS
    derived: Mapping[str, str] = {"prompt": "the caption file beside the image"}

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        """See the base class."""
        return any(set(pair) <= set(names) for pair in _FOLDERS)

    def list_pairs(self, rows: Iterator[RawRow]) -> pa.Table:  # noqa: ARG002
        """See the base class."""
        inside = {path.name for path in self.path.iterdir()}
        win, lose = next(pair for pair in _FOLDERS if set(pair) <= inside)
        return paired(self.path / win, self.path / lose, f"{self.path}/")


class WinLoseSuffixes(FolderLayout):
    """``NAME_w.png`` and ``NAME_l.png`` in one folder, with the caption in ``NAME.txt`` or beside one of them."""

    name: ClassVar[str] = "win-lose-suffixes"
    data_sets: ClassVar[str] = "a folder with `NAME_w.png` and `NAME_l.png`"
    columns: PairColumns = _COLUMNS
    derived: Mapping[str, str] = {"prompt": "the caption file"}

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        """See the base class."""
        stems = {PurePosixPath(name).stem for name in names if name.lower().endswith(_IMAGES)}
        return any(stem.endswith("_w") and f"{stem[:-2]}_l" in stems for stem in stems)

    def list_pairs(self, rows: Iterator[RawRow]) -> pa.Table:  # noqa: ARG002
        """See the base class."""
        files = {path.name: path for path in self.path.iterdir() if not path.name.startswith(".")}
        images, captions = _by_stem(files, _IMAGES), _by_stem(files, _CAPTIONS)
        chosen, rejected = (
            {stem[:-2]: path for stem, path in images.items() if stem.endswith(end)} for end in _SUFFIXES
        )
        known = {
            stem: path
            for stem in {**chosen, **rejected}
            for path in [captions.get(stem) or captions.get(f"{stem}_w") or captions.get(f"{stem}_l")]
            if path
        }
        return _table(chosen, rejected, read_captions(known), f"{self.path}/")


def paired(
    chosen: AnyPath, rejected: AnyPath, start: str = "", captions: Mapping[str, str | None] | None = None
) -> pa.Table:
    """List the images of two folders and their subfolders by name; a missing one is null.

    Args:
        chosen: folder of the preferred images.
        rejected: folder of the others.
        start: the start of the paths that the table leaves out.
        captions: captions by name; None: read the files beside the images, preferably beside the preferred ones.

    Raises:
        UserError: a folder or caption cannot be read, or two images of a folder differ in their suffix only.
    """
    files = [_relative(folder) for folder in (chosen, rejected)]
    images = [_by_stem(each, _IMAGES) for each in files]
    if captions is None:
        captions = read_captions({**_by_stem(files[1], _CAPTIONS), **_by_stem(files[0], _CAPTIONS)})
    return _table(images[0], images[1], captions, start)


def image_names(folder: AnyPath) -> list[str]:
    """List the names of a folder's images without their suffixes."""
    return list(_by_stem(_relative(folder), _IMAGES))


def read_captions(paths: Mapping[str, AnyPath]) -> dict[str, str | None]:
    """Read the first line of each caption file, as other trainers do; None where it is not UTF-8."""
    return dict(zip(paths, read_all(_first_line, paths.values()), strict=True))


def _first_line(path: AnyPath) -> str | None:
    try:
        lines = path.read_bytes().decode("utf-8-sig").strip().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError:
        return None
    return lines[0].strip() if lines else None


def _relative(folder: AnyPath) -> dict[str, AnyPath]:
    return {str(path).removeprefix(f"{folder}/"): path for path in files_below(folder)}


def _by_stem(files: Mapping[str, AnyPath], suffixes: Sequence[str]) -> dict[str, AnyPath]:
    """Return the files that have one of these suffixes, by name without the suffix."""
    found: dict[str, AnyPath] = {}
    for name, path in files.items():
        if name.lower().endswith(tuple(suffixes)):
            first = found.setdefault(name[: name.rindex(".")], path)
            if first is not path and suffixes is _IMAGES:
                raise UserError(f"{first} and {path} have one name; a pair has one preferred and one other image")
            if not is_unicode(name):
                raise UserError(f"{path}: the name is not valid Unicode; rename the file")
    return found


def _table(
    chosen: Mapping[str, AnyPath], rejected: Mapping[str, AnyPath], captions: Mapping[str, str | None], start: str
) -> pa.Table:
    names = sorted({**chosen, **rejected})
    columns = {
        "prompt": [captions.get(name) for name in names],
        "chosen": [str(chosen[name]).removeprefix(start) if name in chosen else None for name in names],
        "rejected": [str(rejected[name]).removeprefix(start) if name in rejected else None for name in names],
    }
    return pa.table(columns, schema=_PAIRS)
