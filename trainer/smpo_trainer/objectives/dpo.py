"""Diffusion-DPO (arXiv 2311.12908, equation 14): the annotators' labels, each taken as certain."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from smpo_trainer.objectives.base import Metrics, Objective, PairBatch, implicit_margin, reward_metrics

_TIE = 0.5


def dpo_loss(margin_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(sign(label - 1/2) h), [B].

    Args:
        margin_B: h, the implicit reward margin of image_0.
        label_B: the annotator's P(image_0 preferred); decided, since a tie would be a constant ln 2.
    """
    return -functional.logsigmoid((label_B - _TIE).sign() * margin_B)


class DPO(Objective):
    """See :func:`dpo_loss`. On shards made with ``--eta`` this is DDIM-InPO (arXiv 2503.18454)."""

    name: ClassVar[str] = "dpo"
    uses_rewards: ClassVar[bool] = False
    needs: ClassVar[str] = "a label that is no tie"

    @staticmethod
    def usable(preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:  # noqa: ARG004
        """See the base class: ties and pairs that nobody labelled are left out."""
        return ~np.isnan(label_P) & (label_P != _TIE)

    def __call__(self, batch: PairBatch) -> tuple[torch.Tensor, Metrics]:
        """See the base class."""
        margin_B = implicit_margin(batch.error_B2, batch.ref_error_B2, self.options.beta)
        return dpo_loss(margin_B, batch.label_B), reward_metrics(batch, self.options.beta, batch.label_B - _TIE)
