"""Smoothed preference optimization (SmPO-Diffusion, arXiv 2506.02698; in the form of DESIGN 4.4)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from smpo_trainer.objectives.base import Metrics, Objective, PairBatch, implicit_margin, reward_metrics


def smpo_loss(margin_B: torch.Tensor, preference_B: torch.Tensor, gamma: float) -> torch.Tensor:
    """-log sigmoid(gamma (2p - 1) h), [B].

    Swapping a pair's images changes the sign of both factors, so no winner is named; at p = 1/2 the loss is ln 2 and
    its gradient 0.

    Args:
        margin_B: h, the implicit reward margin of image_0.
        preference_B: p, P(image_0 preferred).
        gamma: strength of a certain preference; 10 is the published value.
    """
    return -functional.logsigmoid(gamma * (2 * preference_B - 1) * margin_B)


class SmPO(Objective):
    """See :func:`smpo_loss`."""

    name: ClassVar[str] = "smpo"
    uses_rewards: ClassVar[bool] = True
    needs: ClassVar[str] = "scores"

    @staticmethod
    def usable(preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:  # noqa: ARG004
        """See the base class: every scored pair."""
        return ~np.isnan(preference_P)

    def __call__(self, batch: PairBatch) -> tuple[torch.Tensor, Metrics]:
        """See the base class."""
        margin_B = implicit_margin(batch.error_B2, batch.ref_error_B2, self.options.beta)
        loss_B = smpo_loss(margin_B, batch.preference_B, self.options.gamma)
        # 2p - 1 rather than p - 1/2: the sign of exactly what the loss multiplies with.
        return loss_B, reward_metrics(batch, self.options.beta, 2 * batch.preference_B - 1)
