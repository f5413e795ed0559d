"""Read the prompts that images are made for, from a text file, JSONL or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import arrow_source
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.normalising import MAX_TEXT, is_unicode
from smpo_schemas.reject_kinds import RejectKind

_COLUMNS = ("prompt", "caption")


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
        rows: in the order of first appearance. A repeated prompt is taken once: it would get the same noise, hence the
            same images.
        columns: the file's other columns, a row for each of ``rows``.
    """

    rows: list[PromptRow]
    columns: pa.Table


def read_prompts(path: AnyPath, limit: int | None = None) -> list[str]:
    """Read the distinct prompts of a file, in the order of their first appearance.

    Args:
        path: the file; see :func:`read_prompt_file`.
        limit: maximum number of prompts.

    Raises:
        UserError: the file is missing, of another type, malformed, or has no prompt; or a prompt cannot be used.
    """
    rows = [row for row in read_prompt_file(path).rows if not _is_blank(row)]
    for row in rows:
        if row.reason:
            raise UserError(f"--prompts {path}: row {row.row}: {row.reason}")
    return [row.prompt for row in rows if row.prompt is not None][:limit]


def read_prompt_file(path: AnyPath, limit: int | None = None) -> PromptFile:
    """Read a file of prompts.

    ``.txt`` holds one prompt per line; ``.jsonl`` and ``.parquet`` a column ``prompt`` or ``caption``, as files of
    pairs do. Blank lines of a ``.txt`` are skipped.

    Args:
        path: the file.
        limit: maximum number of :attr:`PromptFile.rows`.

    Raises:
        UserError: the file is missing, of another type, malformed, or has no prompt.
    """
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if not path.is_file():
        raise UserError(f"--prompts {path} is not a file")
    if path.suffix not in readers:
        raise UserError(f"--prompts {path}: give a {', '.join(readers)} file")
    try:
        prompts, columns = readers[path.suffix](path)
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from error
    rows = _distinct(prompts)
    if not any(row.prompt for row in rows):
        reasons = [f"row {row.row}: {row.reason}" for row in rows if not _is_blank(row)]
        raise UserError(f"--prompts {path} holds no prompt" + (f"; {reasons[0]}" if reasons else ""))
    rows = rows[:limit]
    return PromptFile(rows, columns.take([row.row for row in rows]) if columns.num_columns else columns)


def _is_blank(row: PromptRow) -> bool:
    return row.reason is not None and row.reason.startswith(RejectKind.NO_PROMPT)


def _distinct(prompts: Sequence[Any]) -> list[PromptRow]:
    """Check the prompts; each distinct one once."""
    seen: set[str] = set()
    rows = []
    for number, value in enumerate(prompts):
        row = _checked(number, value)
        if row is None or row.prompt in seen:
            continue
        if row.prompt is not None:
            seen.add(row.prompt)
        rows.append(row)
    return rows


def _checked(number: int, value: Any) -> PromptRow | None:  # noqa: ANN401  (anything that a file may hold)
    if value is _BLANK_LINE:
        return None
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


_BLANK_LINE = object()


def _read_text(path: AnyPath) -> tuple[list[Any], pa.Table]:
    # Not splitlines, which also splits at characters that a prompt may contain, such as U+2028.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [line if line.strip() else _BLANK_LINE for line in lines], pa.table({})


def _read_jsonl(path: AnyPath) -> tuple[list[Any], pa.Table]:
    rows = list(_json_rows(path))
    prompts = [row[_column(list(row), path)] for row in rows]
    names = dict.fromkeys(name for row in rows for name in row if name not in _COLUMNS)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(f"--prompts {path}: the values of {name!r} are not all of one type: {error}") from error
    return prompts, pa.table(columns)


def _json_rows(path: AnyPath) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"--prompts {path}: line {number} is not a JSON object")
            yield row


def _read_parquet(path: AnyPath) -> tuple[list[Any], pa.Table]:
    schema = pq.read_schema(arrow_source(path))
    name = _column(schema.names, path)
    # Not the images of a file of pairs: they may not fit in memory.
    others = [field.name for field in schema if field.name not in _COLUMNS and not _holds_bytes(field.type)]
    table = pq.read_table(arrow_source(path), columns=[name, *others])
    return table[name].to_pylist(), table.select(others)


def _holds_bytes(kind: pa.DataType) -> bool:
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or any(map(_holds_bytes, inner))


def _column(names: Sequence[str], path: AnyPath) -> str:
    for name in _COLUMNS:
        if name in names:
            return name
    raise UserError(f"--prompts {path} has no column {' or '.join(_COLUMNS)} (it has: {', '.join(names) or 'none'})")
