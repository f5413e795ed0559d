"""Self-NPO (arXiv 2505.11777): regression on the model's own estimates of x0 trains a model to guide away from.

Estimates of x0 after a few steps of sampling (``smpo-pipeline invert --source truncated``) are poor images; a model
that learns to predict them is a worse one, and replaces the unconditional model in classifier-free guidance, as that of
:mod:`smpo_trainer.objectives.npo` does. No preference is needed: both images of a pair are learned from.

The paper's text has the squared error of x0, as here; its code has a pseudo-Huber loss with c = 0.001.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from smpo_trainer.loss_settings import TimestepWeightingKind
from smpo_trainer.objectives.base import Objective, PairBatch


def selfnpo_loss(error_B2: torch.Tensor) -> torch.Tensor:
    """Compute the mean of both images' errors, [B].

    Args:
        error_B2: errors of the policy; with the timestep weighting ``x0``, errors of x0.
    """
    return error_B2.mean(dim=1)


class SelfNPO(Objective):
    """See :func:`selfnpo_loss`. It has no beta, and logs no implicit rewards."""

    name: ClassVar[str] = "selfnpo"
    summary: ClassVar[str] = "the model's own estimates, for a negative-guidance model (Self-NPO, arXiv 2505.11777)"
    uses_rewards: ClassVar[bool] = False
    uses_reference: ClassVar[bool] = False
    prefers: ClassVar[bool] = False
    trains_negative: ClassVar[bool] = True
    needs: ClassVar[str] = "nothing"
    betas: ClassVar[Mapping[str, float]] = {}
    timestep_weighting: ClassVar[TimestepWeightingKind] = "x0"
    published_shards: ClassVar[Mapping[str, object]] = {"source": "truncated", "prompt_dropout": 0.0}

    @classmethod
    def resolve_beta(cls, beta: float | None, kind: str) -> float:  # noqa: ARG003
        """See the base class; it has no influence."""
        return 1.0 if beta is None else beta

    def usable(self, preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """See the base class; all pairs."""
        return np.ones(len(label_P), dtype=bool)

    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """See the base class; neither."""
        return torch.zeros_like(batch.label_B)

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return selfnpo_loss(batch.error_B2)
