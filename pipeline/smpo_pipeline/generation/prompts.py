"""Read the prompts that models are compared on, from a text file, JSONL or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.errors import UserError

_COLUMNS = ("prompt", "caption")


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Read the distinct prompts of a file, in the order of their first appearance.

    ``.txt`` holds one prompt per line; ``.jsonl`` and ``.parquet`` a column ``prompt`` or ``caption``, as files of
    pairs do. Blank prompts are skipped. A repeated prompt is taken once: it would get the same noise, hence the same
    images.

    Args:
        path: the file.
        limit: maximum number of prompts.

    Raises:
        UserError: the file is missing, of another type, malformed, or has no prompt.
    """
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if not path.is_file():
        raise UserError(f"--prompts {path} is not a file")
    if path.suffix not in readers:
        raise UserError(f"--prompts {path}: give a {', '.join(readers)} file")
    try:
        texts = [_checked(prompt, path) for prompt in readers[path.suffix](path) if prompt is not None]
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from error
    prompts = [prompt for prompt in dict.fromkeys(texts) if prompt]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt")
    return prompts[:limit]


def _read_text(path: Path) -> Iterator[str]:
    # Not splitlines, which also splits at characters that a prompt may contain, such as U+2028.
    yield from path.read_text(encoding="utf-8-sig").split("\n")


def _read_jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"--prompts {path}: line {number} is not a JSON object")
            yield row[_column(list(row), path)]


def _read_parquet(path: Path) -> Iterator[Any]:
    name = _column(pq.read_schema(path).names, path)
    yield from pq.read_table(path, columns=[name])[name].to_pylist()


def _checked(prompt: Any, path: Path) -> str:  # noqa: ANN401  (anything that a file may hold)
    if not isinstance(prompt, str):
        raise UserError(f"--prompts {path}: a prompt is not text: {str(prompt)[:100]}")
    prompt.encode()  # raises ValueError for a lone surrogate, such as \ud83d in JSON
    return prompt.strip()


def _column(names: list[str], path: Path) -> str:
    for name in _COLUMNS:
        if name in names:
            return name
    raise UserError(f"--prompts {path} has no column {' or '.join(_COLUMNS)} (it has: {', '.join(names) or 'none'})")
