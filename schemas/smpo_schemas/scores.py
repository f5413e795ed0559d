"""The scores table: what each reward model said of both images of every pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from smpo_common.errors import UserError
from smpo_common.files import (
    Count,
    FileName,
    arrow_source,
    atomic_path,
    read_versioned,
    reading_parquet,
    sha256_file,
    write_json,
)
from smpo_common.store_path import AnyPath

SCORES_VERSION = 1
SCORES_FILE = "scores.json"
REJECTS_FILE = "rejected.parquet"
IMAGE_IDS = ("image_0_id", "image_1_id")
"""Columns that name both images by their content (:func:`smpo_schemas.pairs.image_id`), null or missing where unknown:
tables of before they were there have schema version 1 too."""

_NULL_IF_MISSING = ("label", "annotator")

_SAME = 1e-4
"""Share of a reward's range by which two float32 scores of one image may differ."""

_SAME_HALF = 0.2
"""The same in half precision, in standard deviations of the reward: twice the largest difference from float32 that was
measured (0.0825: ``hpsv2`` in bf16, 1200 images; docs/results/benchmarks.md), and some room for more images."""


class RewardStatistics(BaseModel):
    """One reward over a data set.

    Attributes:
        model: hub id or folder of the reward model.
        fingerprint: hash of its weights.
        unit: what one unit of the raw score is, for example ``cosine``.
        min, max, mean, std: over all images, in ``unit``.
        agreement: share of the pairs with a decided label that the reward orders as the label does, or None.
        num_labelled: how many pairs that share is over.
        dtype: arithmetic of the model's matrix products: ``fp32``, or the half precision of ``score --dtype``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    fingerprint: str
    unit: str
    min: float
    max: float
    mean: float
    std: float
    agreement: float | None
    num_labelled: Count
    dtype: str = "fp32"


class ScoresPart(BaseModel):
    """One Parquet file of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: FileName
    pairs: Count
    sha256: str


class ScoresInfo(BaseModel):
    """``scores.json``: what the table holds; written last, so that its absence marks an unfinished run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    rewards: dict[str, RewardStatistics]
    parts: list[ScoresPart]
    scored: Count
    rejected: Count


def score_schema(rewards: Sequence[str]) -> pa.Schema:
    """Arrow schema of the table for these reward names: two float32 columns a reward."""
    columns: list[tuple[str, pa.DataType]] = [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("label", pa.float32()),
        ("annotator", pa.string()),
        *((name, pa.string()) for name in IMAGE_IDS),
    ]
    for name in rewards:
        columns += [(f"{name}_0", pa.float32()), (f"{name}_1", pa.float32())]
    return pa.schema(columns)


def write_part(path: AnyPath, rows: Sequence[dict[str, Any]] | pa.Table, rewards: Sequence[str]) -> ScoresPart:
    """Write one part of the table atomically and return its entry."""
    schema = score_schema(rewards)
    table = rows.select(schema.names).cast(schema) if isinstance(rows, pa.Table) else None
    table = pa.Table.from_pylist(list(rows), schema=schema) if table is None else table
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
        return ScoresPart(name=path.name, pairs=table.num_rows, sha256=sha256_file(temporary))


def write_scores_info(directory: AnyPath, info: ScoresInfo) -> None:
    """Write ``scores.json``, which finishes the directory."""
    write_json(directory / SCORES_FILE, info.model_dump())


def read_scores_info(directory: AnyPath) -> ScoresInfo:
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


def read_scores(directory: AnyPath, info: ScoresInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the whole table, in input order; ``columns`` limits what is read (:data:`IMAGE_IDS` where they are there).

    Raises:
        UserError: a part is missing or damaged, has other columns than it should, or another number of rows than
            ``scores.json`` says.
    """
    tables = []
    for part in info.parts:
        path = directory / part.name
        with reading_parquet(path):
            table = pq.ParquetFile(arrow_source(path)).read(columns=list(columns) if columns is not None else None)
            table = _as_written(table, list(info.rewards), columns)
        if table.num_rows != part.pairs:
            raise UserError(f"{path} has {table.num_rows} rows, {SCORES_FILE} says {part.pairs}; score again")
        tables.append(table)
    if not tables:
        return score_schema(list(info.rewards)).empty_table()
    # Older parts lack columns that came later; they are null there.
    return pa.concat_tables(tables, promote_options="default")


def _as_written(table: pa.Table, rewards: Sequence[str], columns: Sequence[str] | None) -> pa.Table:
    """The table with the types of :func:`score_schema`, its values checked (text is UTF-8).

    Tables made by hand may lack labels and annotators: nobody labelled.

    Raises:
        KeyError: it lacks a column that was asked for.
        pyarrow.ArrowException: a column is of another type, or damaged.
    """
    for field in score_schema(rewards):
        asked = field.name not in IMAGE_IDS and (columns is None or field.name in columns)
        if field.name not in table.column_names:
            if columns is None and field.name in _NULL_IF_MISSING:
                table = table.append_column(field, pa.nulls(len(table), field.type))
            elif asked:
                raise KeyError(f"no column {field.name}")
        elif table.schema.field(field.name).type != field.type:
            position = table.column_names.index(field.name)
            table = table.set_column(position, field, table.column(position).cast(field.type))
    table.validate(full=True)
    return table


def image_ids(table: pa.Table) -> np.ndarray | None:
    """The names of all images, str [P, 2]; None where the table does not hold all of them."""
    if not set(IMAGE_IDS) <= set(table.column_names) or any(table[name].null_count for name in IMAGE_IDS):
        return None
    return np.stack([np.array(table[name].to_pylist(), dtype=np.str_) for name in IMAGE_IDS], axis=1)


def reward_scores(table: pa.Table, name: str) -> np.ndarray:
    """Raw scores of one reward: float64 [P, 2]."""
    return np.stack([table[f"{name}_{index}"].to_numpy().astype(np.float64) for index in (0, 1)], axis=1)


def same_score(reward: RewardStatistics) -> float:
    """By how much two scores of one image may differ, in the reward's unit: batches of other sizes round otherwise."""
    return _SAME * (reward.max - reward.min) if reward.dtype == "fp32" else _SAME_HALF * reward.std


def table_labels(table: pa.Table) -> np.ndarray:
    """P(image_0 preferred) of each row: float64 [P], NaN where nobody labelled."""
    return np.array([np.nan if label is None else label for label in table["label"].to_pylist()], dtype=np.float64)


def reward_statistics(
    scores_P2: np.ndarray, labels_P: np.ndarray, *, model: str, fingerprint: str, unit: str, dtype: str = "fp32"
) -> RewardStatistics:
    """Describe one reward over a data set.

    Args:
        scores_P2: float [P, 2], raw scores of image_0 and image_1.
        labels_P: float [P], P(image_0 preferred), NaN where nobody labelled.
        model: hub id or folder.
        fingerprint: hash of the weights.
        unit: of one unit of the raw score.
        dtype: that the model computed in.
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
        dtype=dtype,
    )
