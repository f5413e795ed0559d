"""Weights of the pairs, from a column of the scores table (``--weight-column``).

For reweighting towards the distribution that the model shall serve, as distributionally robust alignment does with a
calibration value of each pair (arXiv 2504.05831). How the values are made is the user's business: the column is added
to the Parquet files that ``--scores`` names, and its values are used as they are. Their mean scales the learning rate,
so 1 is a good one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from smpo_schemas.errors import UserError
from smpo_schemas.files import sha256_json
from smpo_schemas.scores import read_scores, read_scores_info
from smpo_schemas.shards import SampleMeta


@dataclass(frozen=True)
class PairWeights:
    """A weight for every pair of a scores table.

    Attributes:
        column: where they are from.
        table: by pair_id, finite and not negative.
    """

    column: str
    table: Mapping[str, float]

    def of(self, metas: Sequence[SampleMeta]) -> np.ndarray:
        """The weight of each walk's pair, float64 [P]; 0 where the table lacks the pair."""
        return np.array([self.table.get(meta.pair_id, 0.0) for meta in metas], dtype=np.float64)

    def identity(self) -> str:
        """Hash of the column's name and values."""
        return sha256_json({"column": self.column, "values": dict(self.table)})


def read_pair_weights(scores: Path | None, column: str) -> PairWeights:
    """Read the column; a pair without a value has weight 0.

    Args:
        scores: output of ``smpo-pipeline score``, with a column added.
        column: its name.

    Raises:
        UserError: there is no such column of numbers, or a value is negative or not finite.
    """
    if scores is None:
        raise UserError(f"--weight-column {column} is a column of a scores table; name the table with --scores DIR")
    info = read_scores_info(scores)
    for part in info.parts:
        columns = pq.read_schema(scores / part.name).names
        if column not in columns:
            raise UserError(
                f"--weight-column {column}: {scores / part.name} has no such column; it has: {', '.join(columns)}"
            )
    table: dict[str, float] = {}
    for row in read_scores(scores, info, ["pair_id", column]).to_pylist():
        value = row[column]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UserError(
                f"--weight-column {column}: pair {row['pair_id']} in {scores} has the weight {value!r}; "
                "a weight is a number from 0"
            )
        if table.setdefault(row["pair_id"], float(value)) != value:
            raise UserError(
                f"--weight-column {column}: pair {row['pair_id']} has several weights in {scores}; each row of a pair "
                "must have the same"
            )
    return PairWeights(column, table)
