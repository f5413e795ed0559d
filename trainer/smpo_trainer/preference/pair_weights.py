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

from smpo_common.errors import UserError
from smpo_common.files import reading_parquet, sha256_json
from smpo_schemas.scores import read_scores, read_scores_info
from smpo_schemas.shards.samples import SampleMeta
from smpo_trainer.preference.scores_table import require_same_prompt


@dataclass(frozen=True)
class PairWeights:
    """A weight for every pair of a scores table.

    Attributes:
        scores: the table's folder.
        column: where they are from.
        table: prompt and weight by pair_id; weights are finite and not negative.
    """

    scores: Path
    column: str
    table: Mapping[str, tuple[str | None, float]]

    def of(self, metas: Sequence[SampleMeta]) -> np.ndarray:
        """The weight of each trajectory's pair, float64 [P]; 0 where the table lacks the pair.

        Raises:
            UserError: the table has another prompt for a pair.
        """
        return np.array([self._of(meta) for meta in metas], dtype=np.float64)

    def _of(self, meta: SampleMeta) -> float:
        if meta.pair_id not in self.table:
            return 0.0
        prompt, weight = self.table[meta.pair_id]
        require_same_prompt(self.scores, prompt, meta)
        return weight

    def identity(self) -> str:
        """Hash of the column's name and values."""
        return sha256_json(
            {"column": self.column, "values": {pair_id: weight for pair_id, (_, weight) in self.table.items()}}
        )


def read_pair_weights(scores: Path | None, column: str) -> PairWeights:
    """Read the column; a pair without a value has weight 0.

    Args:
        scores: output of ``smpo-pipeline score``, with a column added.
        column: its name.

    Raises:
        UserError: a part is missing or damaged, there is no such column of numbers, or a value is negative or not
            finite.
    """
    if scores is None:
        raise UserError(f"--weight-column {column} is a column of a scores table; name the table with --scores DIR")
    info = read_scores_info(scores)
    for part in info.parts:
        with reading_parquet(scores / part.name):
            columns = pq.read_schema(scores / part.name).names
        if column not in columns:
            raise UserError(
                f"--weight-column {column}: {scores / part.name} has no such column; it has: {', '.join(columns)}"
            )
    table: dict[str, tuple[str | None, float]] = {}
    for row in read_scores(scores, info, ["pair_id", "prompt", column]).to_pylist():
        value = row[column]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UserError(
                f"--weight-column {column}: pair {row['pair_id']} in {scores} has the weight {value!r}; "
                "a weight is a number from 0"
            )
        found = (row["prompt"], float(value))
        if table.setdefault(row["pair_id"], found) != found:
            raise UserError(
                f"--weight-column {column}: pair {row['pair_id']} has several weights or prompts in {scores}; each row "
                "of a pair must have the same"
            )
    return PairWeights(scores, column, table)
