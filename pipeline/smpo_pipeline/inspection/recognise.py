"""Recognise what a path holds by its content."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from smpo_common.errors import UserError
from smpo_schemas.generation.candidates import CANDIDATES_FILE
from smpo_schemas.generation.selection import SELECTION_FILE
from smpo_schemas.manifest import MANIFEST_FILE
from smpo_schemas.pairs import PAIR_SUFFIXES, holds_pairs
from smpo_schemas.scoring.scores import SCORES_FILE

Kind = Literal["pairs", "scores", "selection", "shards"]

_MARKERS: dict[str, Kind] = {MANIFEST_FILE: "shards", SELECTION_FILE: "selection", SCORES_FILE: "scores"}
_UNFINISHED: dict[str, Kind] = {"shard-*.tar": "shards", "scores-*.parquet": "scores"}


def recognise(path: Path) -> tuple[Kind, Path]:
    """Tell pairs, scores, selections and shards apart; for a tar, or the JSON file of an output, return its folder.

    An unfinished output of invert or score is recognised too; its reader reports what is missing.

    Raises:
        UserError: the path does not exist or holds none of them.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    shard = path.suffix == ".tar" and ((path.parent / MANIFEST_FILE).exists() or path.match("shard-*.tar"))
    if shard or path.name in (*_MARKERS, CANDIDATES_FILE):
        path = path.parent
    if path.is_file():
        if path.suffix in PAIR_SUFFIXES:
            return "pairs", path
        raise UserError(f"{path} is neither a file of pairs ({', '.join(PAIR_SUFFIXES)}) nor a folder")
    for pattern, kind in (_MARKERS | _UNFINISHED).items():
        if any(path.glob(pattern)):
            return kind, path
    if holds_pairs(path):
        return "pairs", path
    raise UserError(
        f"{path} holds neither pairs ({', '.join(PAIR_SUFFIXES)}), nor scores ({SCORES_FILE}), nor shards "
        f"({MANIFEST_FILE})"
    )
