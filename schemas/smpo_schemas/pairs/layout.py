"""The interface of a layout (:mod:`smpo_schemas.layouts`): how the rows of a data set become pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import pyarrow as pa

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.columns import PairColumns, has_column, refuse_repeated
from smpo_schemas.pairs.normalising import MAX_TEXT, Pair, is_unicode, normalise
from smpo_schemas.pairs.raw_rows import RawRow, RowRange

FURTHER: Mapping[str, pa.DataType] = {
    "confidence": pa.float32(),
    "category": pa.string(),
    "model_0": pa.string(),
    "model_1": pa.string(),
}
"""Columns besides a pair's own that layouts carry into the scores table, and their types."""

_LISTED_AT_ONCE = 1024
_MAX_FLOAT = 3e38


@dataclass(frozen=True)
class ReadingChoices:
    """What flags say about reading the input.

    Attributes:
        columns: names of columns, by field of :class:`PairColumns`; None or missing: no flag was given.
        layout: name of the layout; None: the one that is recognised.
        image_root: folder that image paths are relative to; None: the layout's own.
        axis: which question the votes answer, in layouts with several.
        min_confidence: smallest confidence of a pair, in layouts that state one; None: any.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    layout: str | None = None
    image_root: AnyPath | None = None
    axis: str | None = None
    min_confidence: float | None = None

    def given(self) -> dict[str, str]:
        """Return the choices that were made, by name, as text."""
        values = {**self.columns, **{each.name: getattr(self, each.name) for each in fields(self)}}
        return {name: str(value) for name, value in values.items() if value is not None and name != "columns"}


class Layout(ABC):
    """How the rows of one file become pairs.

    Attributes:
        name: the value of ``--layout``.
        data_sets: the data sets in this layout, for docs/reference/layouts.md.
        uses: names of further choices (:class:`ReadingChoices`) that it takes into account.
        in_two_formats: whether the data set comes with its pairs in two formats, of which one must be chosen.
        required: columns that it is recognised by.
        optional: columns that it uses where they are there.
        derived: what the fields are computed from that no column holds as they are; shown by ``inspect``.
        further: columns of the converted rows, of :data:`FURTHER`, that the scores table takes over.
        columns: where the fields of a pair are in the converted rows.
        path: the file.
        choices: the user's choices.
        needs: the file's columns to read.
        folder: the folder that image paths are relative to.
    """

    name: ClassVar[str]
    data_sets: ClassVar[str]
    uses: ClassVar[frozenset[str]] = frozenset()
    in_two_formats: ClassVar[bool] = False
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    derived: Mapping[str, str] = {}
    further: Sequence[str] = ()
    columns: PairColumns
    path: AnyPath
    choices: ReadingChoices
    needs: list[str]
    folder: AnyPath

    def __init__(self, path: AnyPath, names: Sequence[str], choices: ReadingChoices) -> None:
        """Find the columns of a file.

        Args:
            path: the file.
            names: its columns.
            choices: the user's choices.

        Raises:
            UserError: it lacks a column that is required or named by a flag.
        """
        self.path, self.choices = path, choices
        self.folder = choices.image_root or path.parent
        self.needs = [name for name in (*self.required, *self.optional) if has_column(names, name)]
        for needed in self.needs:
            refuse_repeated(names, needed, path)
        absent: dict[str, Any] = {
            each.name: None
            for each in fields(PairColumns)
            if (name := getattr(self.columns, each.name)) in self.optional and not has_column(names, name)
        }
        self.columns = replace(self.columns, **absent)
        for each, name in choices.columns.items():
            if name is not None:
                if not has_column(names, name):
                    raise UserError(f"{path} has no column {name!r} (it has: {', '.join(names)})")
                self.columns = replace(self.columns, **{each: name})
                self.needs += [] if name in self.needs else [name]

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        """Whether a file with these columns is in this layout."""
        return bool(cls.required) and all(has_column(names, name) for name in cls.required)

    def convert(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the row with the columns that :attr:`columns` and :attr:`further` name.

        Raises:
            PairRejectedError: it cannot become a pair.
        """
        return row

    def pair(self, row: Mapping[str, Any], further: Sequence[str] = ()) -> Pair:
        """Convert one row to a pair; see :func:`smpo_schemas.pairs.normalising.normalise`."""
        pair = normalise(self.convert(row), self.columns, self.folder, (*self.further, *further))
        if not self.further:
            return pair
        fitting = {name: _fitting(name, pair.further[name]) for name in self.further}
        return replace(pair, further={**pair.further, **fitting})

    def image_folders(self) -> list[AnyPath]:
        """List the folders that image paths may be relative to, the most likely first."""
        return [self.folder]

    def describe(self) -> dict[str, str]:
        """Return what each field of a pair is taken from, for ``inspect``."""
        of = {each.name: getattr(self.columns, each.name) for each in fields(PairColumns)}
        return {name: self.derived.get(name, column) for name, column in of.items() if column}


def _fitting(name: str, value: object) -> object:
    """Return a further column's value, or None where it is not of the column's type."""
    if pa.types.is_string(FURTHER[name]):
        return value if isinstance(value, str) and len(value) <= MAX_TEXT and is_unicode(value) else None
    return float(value) if isinstance(value, (int, float)) and abs(value) < _MAX_FLOAT else None


class ListedLayout(Layout):
    """A layout whose pairs are listed in a table in advance, since a row of its file is not one pair.

    Attributes:
        table: one row per pair; its images are paths.
    """

    table: pa.Table

    @abstractmethod
    def list_pairs(self, rows: Iterator[RawRow]) -> pa.Table:
        """Make the table.

        Args:
            rows: rows of the file, with the columns in ``needs``; none for a folder.

        Raises:
            UserError: a file cannot be read.
        """

    def listed_rows(self, part: RowRange) -> Iterator[RawRow]:
        """Yield the table's rows of a range."""
        for start in range(part.start, part.stop, _LISTED_AT_ONCE):
            yield from self.table.slice(start, min(_LISTED_AT_ONCE, part.stop - start)).to_pylist()


class FolderLayout(ListedLayout):
    """A layout of a folder with images, recognised by the names in it."""

    def __init__(self, path: AnyPath, names: Sequence[str], choices: ReadingChoices) -> None:
        """See the base class; ``path`` is the folder, and image paths are relative to it."""
        super().__init__(path, names, choices)
        self.folder = path
