"""Smoothed preference optimization (SmPO-Diffusion, arXiv 2506.02698)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional

from smpo_trainer.objectives.base import PairBatch, RewardObjective


def smpo_loss(margin_B: torch.Tensor, preference_B: torch.Tensor, gamma: float) -> torch.Tensor:
    """Compute -log sigmoid(gamma (2p - 1) h), [B].

    Swapping the images of a pair changes the sign of both factors, so the loss needs no winner. At p = 1/2 the loss is
    ln 2 and its gradient 0.

    Args:
        margin_B: h, the implicit reward margin of image_0.
        preference_B: p, P(image_0 preferred).
        gamma: weight of a preference of p = 1; the published value is 10.
    """
    return -functional.logsigmoid(gamma * (2 * preference_B - 1) * margin_B)


class SmPO(RewardObjective):
    """See :func:`smpo_loss`."""

    name: ClassVar[str] = "smpo"
    summary: ClassVar[str] = "smoothed preferences from rewards (SmPO-Diffusion, arXiv 2506.02698)"
    published_shards: ClassVar[Mapping[str, object]] = {"source": "renoise", "prompt_dropout": 0.2}

    def logit(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return self.options.gamma * self.preferred(batch) * self.margin(batch)

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return smpo_loss(self.margin(batch), batch.preference_B, self.options.gamma)
