"""Read the rows of a file of prompts by its format: text, JSON, JSON lines, CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import arrow_source
from smpo_common.store_path import AnyPath

_COLUMNS = ("prompt", "prompts", "caption")
"""Names of the column of prompts, in any case."""

BLANK = object()
"""A blank line, which is not a row."""

Read = tuple[list[Any], pa.Table]
"""The values of the column of prompts, and the other columns."""


def read_values(path: AnyPath) -> Read:
    """Read a file by its suffix.

    Raises:
        UserError: the file is missing, of another type, malformed, or has no column of prompts.
    """
    if not path.is_file():
        raise UserError(f"--prompts {path} is not a file")
    if path.suffix not in _READERS:
        raise UserError(f"--prompts {path}: give a {', '.join(_READERS)} file")
    try:
        return _READERS[path.suffix](path)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from error


def json_rows(path: AnyPath, what: str | None = None) -> Iterator[dict[str, Any]]:
    """Read the objects of a file of JSON lines.

    Args:
        path: the file.
        what: names it in errors; default: ``--prompts`` and its path.

    Raises:
        UserError: a line is not a JSON object.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{what or f'--prompts {path}'}: line {number} is not a JSON object")
            yield row


def _text(path: AnyPath) -> str:
    return path.read_text(encoding="utf-8-sig")


def _read_text(path: AnyPath) -> Read:
    # Not splitlines, which also splits at characters that a prompt may contain, such as U+2028.
    return [line if line.strip() else BLANK for line in _text(path).split("\n")], pa.table({})


def _read_json_lines(path: AnyPath) -> Read:
    return _of_rows(list(json_rows(path)), path)


def _read_json(path: AnyPath) -> Read:
    """Read a list of prompts or objects, an object with a list per category, or an object with a list per column."""
    content = json.loads(_text(path))
    if isinstance(content, dict) and content and all(isinstance(value, list) for value in content.values()):
        if any(name.lower() in _COLUMNS for name in content):
            lengths = {name: len(values) for name, values in content.items()}
            if len(set(lengths.values())) > 1:
                raise UserError(f"--prompts {path}: its columns differ in length: {lengths}")
            content = [dict(zip(content, values, strict=True)) for values in zip(*content.values(), strict=True)]
        else:
            content = [_with_category(row, name) for name, rows in content.items() for row in rows]
    if not isinstance(content, list):
        raise UserError(f"--prompts {path}: expected a JSON list of prompts or objects, or a list for each category")
    return _of_rows([row if isinstance(row, dict) else {"prompt": row} for row in content], path)


def _with_category(row: Any, category: str) -> dict[str, Any]:  # noqa: ANN401  (any JSON value)
    return {**(row if isinstance(row, dict) else {"prompt": row}), "category": category}


def _of_rows(rows: Sequence[Mapping[str, Any]], path: AnyPath) -> Read:
    prompts = [row[_column(list(row), path)] for row in rows]
    names = dict.fromkeys(name for row in rows for name in row if name.lower() not in _COLUMNS)
    return prompts, pa.table({name: _array([row.get(name) for row in rows], name, path) for name in names})


def _array(values: list[Any], name: str, path: AnyPath) -> pa.Array:
    """Make a column; objects, and lists of values that differ in type, become JSON text."""
    if any(isinstance(value, dict) for value in values):
        return _json_text(values)
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError) as error:
        if any(isinstance(value, list) for value in values):
            return _json_text(values)
        raise UserError(f"--prompts {path}: the values of {name!r} are not all of one type: {error}") from error


def _json_text(values: Sequence[Any]) -> pa.Array:
    return pa.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values], pa.string())


def _read_csv(path: AnyPath) -> Read:
    return _of_cells(list(csv.reader(io.StringIO(_text(path), newline=""), strict=True)), path)


def _read_tsv(path: AnyPath) -> Read:
    """Read tab-separated values; spreadsheets write them without quoting, so that a quote may be part of a prompt."""
    text = _text(path)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), "excel-tab", strict=True))
        quoted = not any("\n" in cell for row in rows for cell in row)
    except csv.Error:
        quoted = False
    if not quoted:
        rows = list(csv.reader(text.split("\n"), "excel-tab", quoting=csv.QUOTE_NONE))
    return _of_cells(rows, path)


def _of_cells(rows: Sequence[Sequence[str]], path: AnyPath) -> Read:
    """Make columns from rows of cells, the first of which names them; blank lines are no rows, missing cells null."""
    if not rows:
        return [], pa.table({})
    names = [name.strip() for name in rows[0]]
    for number, row in enumerate(rows[1:], start=2):
        if any(cell.strip() for cell in row[len(names) :]):
            raise UserError(f"--prompts {path}: row {number} has {len(row)} cells, the header {len(names)}")
    prompt = names.index(_column(names, path))
    filled = [[*row[: len(names)], *[None] * (len(names) - len(row))] for row in rows[1:]]
    prompts = [row[prompt] if any(row) else BLANK for row in filled]
    others = {name: place for place, name in enumerate(names) if name and name.lower() not in _COLUMNS}
    return prompts, pa.table(
        {name: pa.array([row[place] for row in filled], pa.string()) for name, place in others.items()}
    )


def _read_parquet(path: AnyPath) -> Read:
    schema = pq.read_schema(arrow_source(path))
    name = _column(schema.names, path)
    # Not the images of a file of pairs: they may not fit in memory.
    others = [field.name for field in schema if field.name.lower() not in _COLUMNS and not _holds_bytes(field.type)]
    table = pq.read_table(arrow_source(path), columns=[name, *others])
    return table[name].to_pylist(), _with_class_names(table.select(others))


def _holds_bytes(kind: pa.DataType) -> bool:
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or any(map(_holds_bytes, inner))


def _with_class_names(table: pa.Table) -> pa.Table:
    """Replace class numbers by class names, which the ``datasets`` library keeps in the file's metadata."""
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    for name, feature in metadata.get("info", {}).get("features", {}).items():
        classes = feature.get("names") if isinstance(feature, dict) else None
        if classes and name in table.column_names and pa.types.is_integer(table.schema.field(name).type):
            numbers = table[name].to_pylist()
            # -1 is a row without a class.
            named = [classes[number] if number is not None and number >= 0 else None for number in numbers]
            table = table.set_column(table.column_names.index(name), name, pa.array(named, pa.string()))
    return table


def _column(names: Sequence[str], path: AnyPath) -> str:
    for wanted in _COLUMNS:
        for name in names:
            if name.lower() == wanted:
                return name
    raise UserError(f"--prompts {path} has no column prompt, prompts or caption (it has: {', '.join(names) or 'none'})")


_READERS: dict[str, Callable[[AnyPath], Read]] = {
    ".txt": _read_text,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
