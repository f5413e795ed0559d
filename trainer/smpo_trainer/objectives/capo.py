"""Calibrated preference optimization (CaPO, arXiv 2502.02588): regression to the calibrated reward difference.

The calibrated reward of an image is its expected win rate against the other images of its prompt. ``--preference
winrate`` sets p so that the difference between the win rates of a pair is 2p - 1. If a prompt has a single pair, the
win rates are p and 1 - p, and every ``--preference`` gives this difference. The paper weights the implicit reward by
sigmoid(-lambda_t + b), with lambda_t the log signal-to-noise ratio: ``--timestep-weighting sigmoid``, the default of
this objective, with the best b of the paper's ablation (1.5). No code was published, and no beta was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from smpo_trainer.loss_settings import TimestepWeightingKind
from smpo_trainer.objectives.base import PairBatch, RewardObjective

if TYPE_CHECKING:
    from smpo_trainer.preference.reward_mix import RewardMix


def capo_loss(margin_B: torch.Tensor, preference_B: torch.Tensor) -> torch.Tensor:
    """Compute ((2p - 1) - h)^2, [B].

    Args:
        margin_B: h, the implicit reward margin of image_0, from errors weighted by timestep.
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
        """See the base class; the published target is a difference of win rates in log-odds."""
        name, weights = mix.preference.name, mix.preference.weights
        scaled_by_range = [reward for reward in weights if mix.temperatures is None and reward not in mix.ranges]
        lines = []
        if scaled_by_range:
            lines.append(
                f"the published targets are win rates in log-odds; --preference {name} divides "
                f"{', '.join(scaled_by_range)} by max - min over the data set, which makes them far smaller; give "
                "--reward-range NAME=raw for a reward in log-odds, NAME=0:SCALE for others (pickscore=0:0.01), or "
                "--preference winrate with --calibration"
            )
        if name == "minmax" and len(weights) > 1:
            lines.append(
                "the published method averages the win rates of the rewards, --preference minmax takes the win rate of "
                "their sum; give --preference winrate"
            )
        return lines

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return capo_loss(self.margin(batch), batch.preference_B)
