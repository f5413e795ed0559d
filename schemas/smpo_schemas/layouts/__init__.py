"""Layouts of published data sets and of people's own. To add one, add a file with a :class:`Layout` here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from smpo_common.discovery import subclasses_in
from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_schemas.generation.candidates import CANDIDATES_SCHEMA
from smpo_schemas.generation.selection import SELECTED_SCHEMA
from smpo_schemas.layouts.named_columns import NamedColumns
from smpo_schemas.pairs.layout import FolderLayout, Layout, ReadingChoices

__all__ = ["find_layout", "folder_layout_of", "layout_of", "layouts"]

_OF_A_PAIR = ("image_0", "image_1", "label", "votes", "chosen", "rejected")
"""Columns whose flags describe the file's layout, so that no layout is looked for."""

_WRITTEN = (frozenset(CANDIDATES_SCHEMA.names), frozenset(SELECTED_SCHEMA.names))
"""Columns of the files that ``generate`` and ``select`` write."""


def layouts() -> dict[str, type[Layout]]:
    """Return every layout by name."""
    found = subclasses_in(sys.modules[__name__], Layout)
    return {layout.name: layout for layout in found if "name" in vars(layout)}


def find_layout(name: str) -> type[Layout]:
    """Return the layout of that name.

    Raises:
        UserError: there is none.
    """
    known = layouts()
    if name not in known:
        raise UserError(f"unknown --layout {name}; known: {', '.join(sorted(known))}")
    return known[name]


def layout_of(path: AnyPath, names: Sequence[str], choices: ReadingChoices) -> Layout:
    """Return the layout of a file: the chosen one, else the one that is recognised, else columns named by flags.

    Args:
        path: the file.
        names: its columns.
        choices: the user's choices.

    Raises:
        UserError: the file is not in the chosen layout, or lacks a column.
    """
    if choices.layout:
        kind = find_layout(choices.layout)
        if issubclass(kind, FolderLayout):
            raise UserError(f"{path}: --layout {kind.name} is for folders")
        if kind is not NamedColumns and not kind.recognises(names):
            raise UserError(
                f"{path} is not in the layout {kind.name}, which needs {', '.join(kind.required)}; it has: "
                f"{', '.join(names)}"
            )
        return kind(path, names, choices)
    described = any(choices.columns.get(name) for name in _OF_A_PAIR)
    # They carry the columns of their prompts, which may be those of a data set with other images of the same prompts.
    described |= any(written <= set(names) for written in _WRITTEN)
    of_files = [kind for kind in layouts().values() if not issubclass(kind, FolderLayout)]
    matching = [] if described else [kind for kind in of_files if kind.recognises(names)]
    # The one that requires the most columns: a layout may also have all columns that another one requires.
    kind = max(matching, key=lambda layout: len(layout.required), default=NamedColumns)
    return kind(path, names, choices)


def folder_layout_of(path: AnyPath, choices: ReadingChoices) -> FolderLayout | None:
    """Return the layout of a folder with images: the chosen or the recognised one; None if there is none."""
    kinds = [find_layout(choices.layout)] if choices.layout else layouts().values()
    names = [entry.name for entry in path.iterdir()]
    for kind in kinds:
        if issubclass(kind, FolderLayout) and kind.recognises(names):
            return kind(path, names, choices)
    return None
