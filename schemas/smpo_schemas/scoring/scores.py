"""The scores table: each reward model's scores of both images of every pair."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
from smpo_schemas.frozen import FrozenModel
from smpo_schemas.labels import TIE
from smpo_schemas.pairs.layout import FURTHER

SCORES_VERSION = 1
SCORES_FILE = "scores.json"
PART_FILES = "scores-*.parquet"
REWARD_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
"""Pattern of a reward's name NAME; its columns are NAME_0 and NAME_1."""

IMAGE_IDS = ("image_0_id", "image_1_id")
"""Columns with a hash of each image's content (:func:`smpo_schemas.pairs.image_id`), null or missing where unknown:
tables written before these columns existed have schema version 1 too."""

_NULL_IF_MISSING = ("label", "votes", "annotator")

_TOLERANCE = 1e-4
"""Largest difference of two float32 scores of one image, as a share of the reward's range."""

_HALF_TOLERANCE = 0.2
"""The same in half precision, in standard deviations of the reward: twice the largest measured difference from float32
(0.0825: ``hpsv2`` in bf16, 1200 images; docs/results/benchmarks.md), and a margin for more images."""


class RewardStatistics(FrozenModel):
    """One reward over a data set.

    Attributes:
        model: hub id or folder of the reward model.
        fingerprint: hash of its weights.
        unit: unit of the raw score, for example ``cosine``.
        min, max, mean, std: statistics over all images, in ``unit``.
        agreement: share of the pairs with a decided label that the reward orders as the label does; None without any.
        num_labelled: number of pairs with a decided label.
        dtype: dtype of the model's matrix products: ``fp32``, or the half precision of ``score --dtype``.
    """

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


class ScoresPart(FrozenModel):
    """One Parquet file of the table.

    Attributes:
        name: file name.
        pairs: number of rows.
        sha256: hash of the file.
        scored_sha256: hash of the file as it was scored, where `weigh` added a column since; else null.
    """

    name: FileName
    pairs: Count
    sha256: str
    scored_sha256: str | None = None

    @property
    def content(self) -> str:
        """Hash of what ``score`` wrote, which a column of weights does not change."""
        return self.scored_sha256 or self.sha256


class ScoresInfo(FrozenModel):
    """``scores.json``: describes the table; written last, so that its absence marks an unfinished run.

    Attributes:
        schema_version: version of the format of this file and of the table.
        rewards: statistics of each reward, by name.
        parts: the table's files, in input order.
        scored: number of pairs in the table.
        rejected: number of rows of ``rejected.parquet``.
    """

    schema_version: int
    rewards: dict[str, RewardStatistics]
    parts: list[ScoresPart]
    scored: Count
    rejected: Count


def score_schema(rewards: Sequence[str], further: Sequence[str] = ()) -> pa.Schema:
    """Make the table's Arrow schema.

    Args:
        rewards: their names; two float32 columns each.
        further: names of further columns of the pairs (:data:`smpo_schemas.pairs.FURTHER`).
    """
    columns = [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("label", pa.float32()),
        ("votes", pa.int32()),
        ("annotator", pa.string()),
        *((name, pa.string()) for name in IMAGE_IDS),
        *((name, FURTHER[name]) for name in further),
        *((name, pa.float32()) for name in score_columns(rewards)),
    ]
    return pa.schema(columns)


def score_columns(rewards: Iterable[str]) -> list[str]:
    """Return the names of the columns of scores, two per reward."""
    return [f"{name}_{index}" for name in rewards for index in (0, 1)]


def write_part(
    path: AnyPath,
    rows: Sequence[dict[str, Any]] | pa.Table,
    rewards: Sequence[str],
    further: Sequence[str] = (),
    added: Sequence[pa.Field] = (),
) -> ScoresPart:
    """Write one part of the table atomically and return its entry; ``added`` are columns besides the schema's."""
    schema = pa.schema([*score_schema(rewards, further), *added])
    table = rows.select(schema.names).cast(schema) if isinstance(rows, pa.Table) else None
    table = pa.Table.from_pylist(list(rows), schema=schema) if table is None else table
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
        return ScoresPart(name=path.name, pairs=table.num_rows, sha256=sha256_file(temporary))


def write_scores_info(directory: AnyPath, info: ScoresInfo) -> None:
    """Write ``scores.json``, which finishes the directory."""
    write_json(directory / SCORES_FILE, info.model_dump())


def remove_leftovers(directory: AnyPath, info: ScoresInfo) -> None:
    """Remove parts that do not belong to the table: unfinished or replaced ones."""
    names = {part.name for part in info.parts}
    for path in directory.glob(PART_FILES):
        if path.name not in names:
            path.unlink()


def read_scores_info(directory: AnyPath) -> ScoresInfo:
    """Read ``scores.json``.

    Raises:
        UserError: the directory is not a finished output of ``score``, or has another schema version.
    """
    path = directory / SCORES_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} has no {SCORES_FILE}: it is not the output of `smpo-pipeline score`, or unfinished; run "
            "`smpo-pipeline score` again"
        )
    return read_versioned(path, ScoresInfo, SCORES_VERSION, "score again")


def read_scores(directory: AnyPath, info: ScoresInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the table, in input order; ``columns`` selects columns (:data:`IMAGE_IDS` only where they exist).

    Raises:
        UserError: a part is missing or damaged, lacks a column, or has another number of rows than ``scores.json``
            says.
    """
    tables = []
    for part in info.parts:
        path = directory / part.name
        with reading_parquet(path):
            table = pq.ParquetFile(arrow_source(path)).read(columns=list(columns) if columns is not None else None)
            table = _conform(table, list(info.rewards), columns)
        if table.num_rows != part.pairs:
            raise UserError(f"{path} has {table.num_rows} rows, {SCORES_FILE} says {part.pairs}; score again")
        tables.append(table)
    if not tables:
        return score_schema(list(info.rewards)).empty_table()
    # Older parts lack newer columns, which become null.
    return pa.concat_tables(tables, promote_options="default")


def require_column(directory: AnyPath, info: ScoresInfo, column: str, flag: str) -> None:
    """Check that every part of the table has a column.

    Raises:
        UserError: one lacks it, or cannot be read; names the ``flag``.
    """
    for part in info.parts:
        path = directory / part.name
        with reading_parquet(path):
            columns = pq.read_schema(arrow_source(path)).names
        if column not in columns:
            raise UserError(f"{flag} {column}: not a column of {path}, which has: {', '.join(columns)}")


def _conform(table: pa.Table, rewards: Sequence[str], columns: Sequence[str] | None) -> pa.Table:
    """Cast to the types of :func:`score_schema` and check the values (text is UTF-8).

    Tables made by hand may lack labels and annotators, and older ones lack votes; these become null.

    Raises:
        KeyError: a requested column is missing.
        pyarrow.ArrowException: a column has another type, or is damaged.
    """
    for field in score_schema(rewards):
        requested = field.name not in IMAGE_IDS and (columns is None or field.name in columns)
        if field.name not in table.column_names:
            if columns is None and field.name in _NULL_IF_MISSING:
                table = table.append_column(field, pa.nulls(len(table), field.type))
            elif requested:
                raise KeyError(f"no column {field.name}")
        elif table.schema.field(field.name).type != field.type:
            position = table.column_names.index(field.name)
            table = table.set_column(position, field, table.column(position).cast(field.type))
    table.validate(full=True)
    return table


def image_ids(table: pa.Table) -> np.ndarray | None:
    """Return the content hashes of all images, str [P, 2], or None if the table lacks any."""
    if not set(IMAGE_IDS) <= set(table.column_names) or any(table[name].null_count for name in IMAGE_IDS):
        return None
    return np.stack([np.array(table[name].to_pylist(), dtype=np.str_) for name in IMAGE_IDS], axis=1)


def reward_scores(table: pa.Table, name: str) -> np.ndarray:
    """Return the raw scores of one reward, float64 [P, 2]."""
    return np.stack([table[f"{name}_{index}"].to_numpy().astype(np.float64) for index in (0, 1)], axis=1)


def score_tolerance(reward: RewardStatistics) -> float:
    """Return the largest difference of two scores of one image, in the reward's unit: rounding depends on the batch."""
    return _TOLERANCE * (reward.max - reward.min) if reward.dtype == "fp32" else _HALF_TOLERANCE * reward.std


def table_labels(table: pa.Table) -> np.ndarray:
    """Return P(image_0 preferred) of each row, float64 [P], NaN where there is no label."""
    return np.array([np.nan if label is None else label for label in table["label"].to_pylist()], dtype=np.float64)


def table_votes(table: pa.Table) -> np.ndarray:
    """Return the number of votes of each row, float64 [P], NaN where it is unknown."""
    return np.array([np.nan if votes is None else votes for votes in table["votes"].to_pylist()], dtype=np.float64)


def label_agreement(preference_P: np.ndarray, labels_P: np.ndarray) -> tuple[int, int]:
    """Count the decided labels that a preference orders alike, and all decided labels.

    Args:
        preference_P: float [P], positive where image_0 is preferred, negative where image_1 is.
        labels_P: float [P], P(image_0 preferred), NaN where there is no label.
    """
    decided = ~np.isnan(labels_P) & (labels_P != TIE)
    alike = np.sign(preference_P) == np.sign(labels_P - TIE)
    return int((alike & decided).sum()), int(decided.sum())


def reward_statistics(
    scores_P2: np.ndarray, labels_P: np.ndarray, *, model: str, fingerprint: str, unit: str, dtype: str = "fp32"
) -> RewardStatistics:
    """Describe one reward over a data set.

    Args:
        scores_P2: float [P, 2], raw scores of image_0 and image_1.
        labels_P: float [P], P(image_0 preferred), NaN where there is no label.
        model: hub id or folder.
        fingerprint: hash of the weights.
        unit: unit of the raw score.
        dtype: dtype of the model's matrix products.
    """
    scores_P2 = np.asarray(scores_P2, dtype=np.float64)
    alike, decided = label_agreement(scores_P2[:, 0] - scores_P2[:, 1], labels_P)
    return RewardStatistics(
        model=model,
        fingerprint=fingerprint,
        unit=unit,
        min=float(scores_P2.min()),
        max=float(scores_P2.max()),
        mean=float(scores_P2.mean()),
        std=float(scores_P2.std()),
        agreement=alike / decided if decided else None,
        num_labelled=decided,
        dtype=dtype,
    )
