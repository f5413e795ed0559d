"""The scores table: what each reward model said of both images of every pair (DESIGN 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from smpo_schemas.errors import UserError
from smpo_schemas.files import atomic_path, read_versioned, sha256_file, write_json

SCORES_VERSION = 1
SCORES_FILE = "scores.json"
REJECTS_FILE = "rejected.parquet"


class RewardStatistics(BaseModel):
    """One reward over a data set.

    Attributes:
        model: hub id or folder of the reward model.
        fingerprint: hash of its weights.
        unit: what one unit of the raw score is, for example ``cosine``.
        min, max, mean, std: over all images, in ``unit``.
        agreement: share of the pairs with a decided label that the reward orders as the label does, or None.
        num_labelled: how many pairs that share is over.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    fingerprint: str
    unit: str
    min: float
    max: float
    mean: float
    std: float
    agreement: float | None
    num_labelled: int


class ScoresPart(BaseModel):
    """One Parquet file of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    pairs: int
    sha256: str


class ScoresInfo(BaseModel):
    """``scores.json``: what the table holds; written last, so that its absence marks an unfinished run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    rewards: dict[str, RewardStatistics]
    parts: list[ScoresPart]
    scored: int
    rejected: int


def score_schema(rewards: Sequence[str]) -> pa.Schema:
    """Arrow schema of the table for these reward names: two float32 columns a reward."""
    columns: list[tuple[str, pa.DataType]] = [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("label", pa.float32()),
        ("annotator", pa.string()),
    ]
    for name in rewards:
        columns += [(f"{name}_0", pa.float32()), (f"{name}_1", pa.float32())]
    return pa.schema(columns)


def write_part(path: Path, rows: Sequence[dict[str, Any]], rewards: Sequence[str]) -> ScoresPart:
    """Write one part of the table atomically and return its entry."""
    table = pa.Table.from_pylist(list(rows), schema=score_schema(rewards))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
    return ScoresPart(name=path.name, pairs=len(rows), sha256=sha256_file(path))


def write_scores_info(directory: Path, info: ScoresInfo) -> None:
    """Write ``scores.json``, which finishes the directory."""
    write_json(directory / SCORES_FILE, info.model_dump())


def read_scores_info(directory: Path) -> ScoresInfo:
    """Read ``scores.json``.

    Raises:
        UserError: the directory is no finished output of ``score``, or of another schema version.
    """
    path = directory / SCORES_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} holds no {SCORES_FILE}: not the output of `smpo-pipeline score`, or unfinished (run it again)"
        )
    return read_versioned(path, ScoresInfo, SCORES_VERSION, "score again")


def read_scores(directory: Path, info: ScoresInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the whole table, in input order; ``columns`` limits what is read.

    Raises:
        UserError: a part is missing or has another number of rows than ``scores.json`` says.
    """
    tables = []
    for part in info.parts:
        path = directory / part.name
        try:
            table = pq.read_table(path, columns=list(columns) if columns is not None else None)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if table.num_rows != part.pairs:
            raise UserError(f"{path} has {table.num_rows} rows, {SCORES_FILE} says {part.pairs}; score again")
        tables.append(table)
    if not tables:
        return score_schema(list(info.rewards)).empty_table()
    return pa.concat_tables(tables)


def reward_statistics(
    scores_P2: np.ndarray, labels_P: np.ndarray, *, model: str, fingerprint: str, unit: str
) -> RewardStatistics:
    """Describe one reward over a data set.

    Args:
        scores_P2: float [P, 2], raw scores of image_0 and image_1.
        labels_P: float [P], P(image_0 preferred), NaN where nobody labelled.
        model: hub id or folder.
        fingerprint: hash of the weights.
        unit: of one unit of the raw score.
    """
    scores_P2 = np.asarray(scores_P2, dtype=np.float64)
    decided = ~np.isnan(labels_P) & (labels_P != 0.5)  # noqa: PLR2004  (0.5 is a tie)
    order = np.sign(scores_P2[:, 0] - scores_P2[:, 1])
    wanted = np.sign(labels_P - 0.5)
    agreement = float(np.mean(order[decided] == wanted[decided])) if decided.any() else None
    return RewardStatistics(
        model=model,
        fingerprint=fingerprint,
        unit=unit,
        min=float(scores_P2.min()),
        max=float(scores_P2.max()),
        mean=float(scores_P2.mean()),
        std=float(scores_P2.std()),
        agreement=agreement,
        num_labelled=int(decided.sum()),
    )
