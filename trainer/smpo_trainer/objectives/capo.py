"""Calibrated preference optimization (CaPO, arXiv 2502.02588): regression to the calibrated reward difference.

An image's calibrated reward is its expected win rate over the other images of its prompt. ``--preference winrate``
makes p of it such that the difference between a pair's images is 2p - 1; of a pair alone the two win rates are p and
1 - p, and any other ``--preference`` gives the same difference of them. The paper weighs the implicit reward by
sigmoid(-lambda_t + b), lambda the log signal-to-noise ratio: ``--timestep-weighting sigmoid``, which is this
objective's default, with the b that did best in its ablation (1.5; no code was published). Its beta was not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from smpo_trainer.objectives.base import PairBatch, RewardObjective
from smpo_trainer.settings import TimestepWeightingKind

if TYPE_CHECKING:
    from smpo_trainer.preference.reward_mix import RewardMix


def capo_loss(margin_B: torch.Tensor, preference_B: torch.Tensor) -> torch.Tensor:
    """((2p - 1) - h)^2, [B].

    Args:
        margin_B: h, the implicit reward margin of image_0, of errors that are weighted by timestep.
        preference_B: p, P(image_0 preferred).
    """
    return (2 * preference_B - 1 - margin_B).square()


class CaPO(RewardObjective):
    """See :func:`capo_loss`."""

    name: ClassVar[str] = "capo"
    summary: ClassVar[str] = "the margin regressed to the calibrated reward difference (CaPO, arXiv 2502.02588)"
    timestep_weighting: ClassVar[TimestepWeightingKind] = "sigmoid"
    published_shards: ClassVar[Mapping[str, object]] = {"source": "forward", "forward_noise": "image"}
    sigmoid_bias: ClassVar[float] = 1.5

    @classmethod
    def warnings(cls, mix: RewardMix) -> list[str]:
        """See the base class: the published target is a difference of win rates by log-odds."""
        name, weights = mix.preference.name, mix.preference.weights
        by_extremes = [reward for reward in weights if mix.temperatures is None and reward not in mix.ranges]
        lines = []
        if by_extremes:
            lines.append(
                f"published are win rates by log-odds; --preference {name} divides {', '.join(by_extremes)} by max - "
                "min over the data set, whose targets are far smaller; give --reward-range NAME=raw for log-odds, "
                "NAME=0:SCALE for others (pickscore=0:0.01), or --preference winrate with --calibration"
            )
        if name == "minmax" and len(weights) > 1:
            lines.append(
                "published is the mean of the rewards' win rates, --preference minmax is the win rate by their sum; "
                "give --preference winrate"
            )
        return lines

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return capo_loss(self.margin(batch), batch.preference_B)
