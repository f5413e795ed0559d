"""Check the prompts that images are made for: each distinct one once, with its category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_pipeline.generation.prompt_files import BLANK, read_values
from smpo_schemas.pairs.normalising import MAX_TEXT, is_unicode
from smpo_schemas.reject_kinds import RejectKind

_CATEGORIES = ("category", "tag", "style")
"""Names of the column of categories, in any case: of PartiPrompts and DrawBench, of GenEval, of HPSv2."""


@dataclass(frozen=True)
class PromptRow:
    """A distinct prompt, or a row that has no usable one.

    Attributes:
        row: number of its row in the file, from 0; of the first one with this prompt.
        prompt: without blanks at its ends; None if the row cannot be used.
        reason: why it cannot.
    """

    row: int
    prompt: str | None
    reason: str | None = None


@dataclass(frozen=True)
class PromptFile:
    """The content of a file of prompts.

    Attributes:
        path: the file.
        rows: in the order of first appearance. A repeated prompt is taken once: it would get the same noise, hence the
            same images.
        columns: the file's other columns, a row for each of ``rows``.
        repeated: number of rows that repeat an earlier prompt.
    """

    path: AnyPath
    rows: list[PromptRow]
    columns: pa.Table
    repeated: int

    def categories(self, column: str | None = None) -> list[str] | None:
        """Return the category of each of ``rows``, blank where there is none; None without a column of categories.

        Args:
            column: its name; default: the first of the known names.

        Raises:
            UserError: there is no such column, or it holds lists or objects.
        """
        names = self.columns.column_names
        known = [name for wanted in _CATEGORIES for name in names if name.lower() == wanted]
        if column is None and not known:
            return None
        if column is not None and column not in names:
            raise UserError(f"--category-column {column}: {self.path} has no such column (it has: {', '.join(names)})")
        name = column or known[0]
        if pa.types.is_nested(self.columns.schema.field(name).type):
            raise UserError(f"--prompts {self.path}: the column {name!r} holds no categories; choose --category-column")
        return ["" if value is None else str(value).strip() for value in self.columns[name].to_pylist()]


@dataclass(frozen=True)
class PromptSet:
    """Usable distinct prompts.

    Attributes:
        texts: in the order of their first appearance.
        categories: of each, blank where it has none; None without a column of categories.
        repeated: number of rows that repeat an earlier prompt.
        rows: number of each one's row in its file, from 0.
    """

    texts: list[str]
    categories: list[str] | None
    repeated: int
    rows: list[int]

    def first(self, limit: int | None) -> PromptSet:
        """Return the first ``limit`` prompts; None: all."""
        categories = self.categories and self.categories[:limit]
        return replace(self, texts=self.texts[:limit], categories=categories, rows=self.rows[:limit])

    @classmethod
    def joined(cls, parts: Mapping[str, PromptSet]) -> PromptSet:
        """Join the prompts of several categories, by their names; one that an earlier category has is left out."""
        found: dict[str, tuple[str, int]] = {}
        for category, part in parts.items():
            for text, row in zip(part.texts, part.rows, strict=True):
                found.setdefault(text, (category, row))
        given = sum(part.repeated + len(part.texts) for part in parts.values())
        categories, rows = zip(*found.values(), strict=True)
        return cls(list(found), list(categories), given - len(found), list(rows))


def read_prompts(path: AnyPath, limit: int | None = None, category_column: str | None = None) -> PromptSet:
    """Read the distinct prompts of a file; blank ones are skipped.

    Args:
        path: the file; see :func:`read_prompt_file`.
        limit: maximum number of prompts.
        category_column: name of the column of categories; default: see :meth:`PromptFile.categories`.

    Raises:
        UserError: the file is missing, of another type, malformed, or has no prompt; or a prompt cannot be used.
    """
    file = read_prompt_file(path)
    categories = file.categories(category_column)
    kept = [place for place, row in enumerate(file.rows) if not _is_blank(row)]
    for row in (file.rows[place] for place in kept):
        if row.reason:
            raise UserError(f"--prompts {path}: row {row.row}: {row.reason}")
    return PromptSet(
        texts=[str(file.rows[place].prompt) for place in kept],
        categories=categories and [categories[place] for place in kept],
        repeated=file.repeated,
        rows=[file.rows[place].row for place in kept],
    ).first(limit)


def read_prompt_file(path: AnyPath, limit: int | None = None) -> PromptFile:
    """Read a file of prompts.

    ``.txt`` holds one prompt per line; ``.json``, ``.jsonl``, ``.csv``, ``.tsv`` and ``.parquet`` a column ``prompt``,
    ``prompts`` or ``caption``, in any case; ``.json`` also a list of prompts, or such a list for each category. Blank
    lines are skipped.

    Args:
        path: the file.
        limit: maximum number of :attr:`PromptFile.rows`.

    Raises:
        UserError: the file is missing, of another type, malformed, or has no prompt.
    """
    prompts, columns = read_values(path)
    rows, repeated = _distinct(prompts)
    if not any(row.prompt for row in rows):
        reasons = [f"row {row.row}: {row.reason}" for row in rows if not _is_blank(row)]
        raise UserError(f"--prompts {path} holds no prompt" + (f"; {reasons[0]}" if reasons else ""))
    rows = rows[:limit]
    kept = columns.take([row.row for row in rows]) if columns.num_columns else columns
    return PromptFile(path, rows, kept, repeated)


def _is_blank(row: PromptRow) -> bool:
    return row.reason is not None and row.reason.startswith(RejectKind.NO_PROMPT)


def _distinct(prompts: Sequence[Any]) -> tuple[list[PromptRow], int]:
    """Check the prompts; each distinct one once. Also count the rows that repeat one."""
    seen: set[str] = set()
    rows, repeated = [], 0
    for number, value in enumerate(prompts):
        row = None if value is BLANK else _checked(number, value)
        if row is None:
            continue
        if row.prompt in seen:
            repeated += 1
            continue
        if row.prompt is not None:
            seen.add(row.prompt)
        rows.append(row)
    return rows, repeated


def _checked(number: int, value: Any) -> PromptRow:  # noqa: ANN401  (anything that a file may hold)
    if value is not None and not isinstance(value, str):
        return PromptRow(number, None, f"{RejectKind.NOT_TEXT}: {str(value)[:100]}")
    prompt = (value or "").strip()
    if not prompt:
        return PromptRow(number, None, f"{RejectKind.NO_PROMPT}: the row is blank")
    if not is_unicode(prompt):
        return PromptRow(number, None, f"{RejectKind.NOT_UNICODE}: prompt")
    if len(prompt) > MAX_TEXT:
        reason = f"{RejectKind.TEXT_TOO_LONG}: prompt has {len(prompt)} characters, above {MAX_TEXT}"
        return PromptRow(number, None, reason)
    return PromptRow(number, prompt)
