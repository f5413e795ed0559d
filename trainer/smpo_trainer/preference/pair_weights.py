"""Weights of pairs, from a column of the scores table (``--weight-column``).

They reweight the data towards a target distribution, as distributionally robust alignment does with a calibration value
per pair (arXiv 2504.05831). ``smpo-pipeline weigh``, or the user, adds the column to the Parquet files of ``--scores``;
its values are used as they are. Their mean scales the learning rate, so it should be about 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_schemas.scoring.scores import read_scores, read_scores_info, require_column
from smpo_schemas.shards.samples import SampleMeta
from smpo_trainer.preference.preference_table import require_same_prompt


@dataclass(frozen=True)
class PairWeights:
    """A weight for every pair of a scores table.

    Attributes:
        scores: folder of the table.
        column: name of the column.
        table: prompt and weight by pair_id; weights are finite and not negative.
    """

    scores: Path
    column: str
    table: Mapping[str, tuple[str | None, float]]

    def lookup(self, metas: Sequence[SampleMeta]) -> np.ndarray:
        """Return the weight of each trajectory's pair, float64 [P]; 0 if the table lacks the pair.

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
        """Hash the name and the values of the column."""
        return sha256_json(
            {"column": self.column, "values": {pair_id: weight for pair_id, (_, weight) in self.table.items()}}
        )


def read_pair_weights(scores: Path | None, column: str) -> PairWeights:
    """Read the column. Pairs without a value get weight 0.

    Args:
        scores: output of ``smpo-pipeline score``, with a column added.
        column: name of the column.

    Raises:
        UserError: a part is missing or damaged, the column is missing, or a value is not a finite number from 0.
    """
    if scores is None:
        raise UserError(f"--weight-column {column} names a column of a scores table: give the table with --scores DIR")
    info = read_scores_info(scores)
    require_column(scores, info, column, "--weight-column")
    table: dict[str, tuple[str | None, float]] = {}
    for row in read_scores(scores, info, ["pair_id", "prompt", column]).to_pylist():
        value = row[column]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise UserError(
                f"--weight-column {column}: pair {row['pair_id']} in {scores} has the weight {value!r}; expected a "
                "finite number from 0"
            )
        entry = (row["prompt"], float(value))
        if table.setdefault(row["pair_id"], entry) != entry:
            raise UserError(
                f"--weight-column {column}: pair {row['pair_id']} has several weights or prompts in {scores}; all rows "
                "of a pair must have the same"
            )
    return PairWeights(scores, column, table)
