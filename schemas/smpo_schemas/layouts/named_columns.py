"""Any table whose columns are named by flags, or have this project's names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import ClassVar

from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.columns import PairColumns, resolve_columns
from smpo_schemas.pairs.layout import Layout, ReadingChoices


class NamedColumns(Layout):
    """The fields of a pair are columns."""

    name: ClassVar[str] = "columns"
    data_sets: ClassVar[str] = "any other Parquet, JSON, JSONL or WebDataset, by `--prompt-column` and its like"

    def __init__(self, path: AnyPath, names: Sequence[str], choices: ReadingChoices) -> None:
        """See the base class."""
        self.path, self.choices = path, choices
        self.folder = choices.image_root or path.parent
        self.use(resolve_columns(names, choices.columns, path))

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:  # noqa: ARG003
        """Return False: this layout is taken if no other one is recognised."""
        return False

    def use(self, columns: PairColumns) -> None:
        """Read the fields of a pair from these columns."""
        self.columns = columns
        self.needs = [name for each in fields(columns) if (name := getattr(columns, each.name))]
