"""The rewards of an experiment: which ones, their weights, and P(image_0 preferred) of every pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smpo_schemas.errors import UserError
from smpo_schemas.files import sha256_file
from smpo_schemas.preference import preference
from smpo_schemas.scores import SCORES_FILE, RewardStatistics, read_scores, read_scores_info
from smpo_schemas.shards import SampleMeta
from smpo_trainer.shard_set import ShardSet

ScoreTable = Mapping[str, Mapping[str, tuple[float, float]]]
"""Raw scores of image_0 and image_1 by pair_id and reward name."""


@dataclass(frozen=True)
class RewardMix:
    """A weighted mix of rewards.

    Attributes:
        weights: by reward name, at least one.
        statistics: by reward name, the extremes that bring its scores to one scale.
        table: scores by pair_id that replace those in the shards; None: the shards' own.
        identity: hash of ``table``'s ``scores.json``, or None.
    """

    weights: Mapping[str, float]
    statistics: Mapping[str, RewardStatistics]
    table: ScoreTable | None
    identity: str | None

    def preferences(self, metas: Sequence[SampleMeta]) -> np.ndarray:
        """P(image_0 preferred) of each walk's pair: float64 [P], NaN where ``table`` lacks the pair.

        Raises:
            UserError: a walk in the shards lacks a reward that its manifest promises.
        """
        scores_P = [meta.scores if self.table is None else self.table.get(meta.pair_id) for meta in metas]
        known = np.array([scores is not None for scores in scores_P], dtype=bool)
        p_P = np.full(len(metas), np.nan)
        if known.any():
            columns = {name: np.array([_of(name, s, m) for s, m in zip(scores_P, metas, strict=True) if s is not None])
                       for name in self.weights}  # fmt: skip
            p_P[known] = preference(columns, self.statistics, self.weights)
        return p_P


def _of(name: str, scores: Mapping[str, tuple[float, float]], meta: SampleMeta) -> tuple[float, float]:
    if name not in scores:
        raise UserError(f"pair {meta.pair_id} in the shards has no score of reward {name!r}")
    return scores[name]


def resolve_mix(wanted: Mapping[str, float], shards: ShardSet, scores: Path | None) -> RewardMix:
    """Find the rewards in the shards, or in ``scores``.

    Args:
        wanted: weights by name; empty: the only reward that there is.
        shards: where the scores come from if ``scores`` is None.
        scores: output of ``smpo-pipeline score``.

    Raises:
        UserError: a reward is not there, or none is named and there are several.
    """
    info = read_scores_info(scores) if scores else None
    statistics = info.rewards if info else shards.reward_statistics()
    source = f"--scores {scores}" if scores else "--shards"
    listed = ", ".join(statistics) or "none"
    if not wanted and len(statistics) != 1:
        raise UserError(f"{source} holds {len(statistics)} rewards ({listed}); choose with --reward NAME[:WEIGHT]")
    weights = dict(wanted) or dict.fromkeys(statistics, 1.0)
    for name in weights:
        if name not in statistics:
            raise UserError(f"--reward {name}: {source} holds no such reward; it holds: {listed}")
    if scores is None or info is None:
        return RewardMix(weights, statistics, None, None)
    columns = ["pair_id", *(f"{name}_{image}" for name in weights for image in (0, 1))]
    rows = read_scores(scores, info, columns).to_pylist()
    table = {row["pair_id"]: {name: (row[f"{name}_0"], row[f"{name}_1"]) for name in weights} for row in rows}
    return RewardMix(weights, statistics, table, sha256_file(scores / SCORES_FILE))
