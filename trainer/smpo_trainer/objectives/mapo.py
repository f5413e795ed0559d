"""Margin-aware preference optimization (MaPO, arXiv 2406.06424), as in its published code.

The loss needs no reference. The score of an image is a bounded, decreasing function of the policy's error, and the
error of the preferred image is minimised together with the margin. Metrics still compare with the stored reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from smpo_schemas.labels import TIE
from smpo_trainer.objectives.base import FORWARD, LabelObjective, ObjectiveOptions, PairBatch, select_preferred

_SMALL = 0.01
"""Use the Taylor series below this x: the quotient tends to 0/0, and the next term of the series is below 1e-16."""


def mapo_score(error_B2: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute phi(e) = k e / (exp(k e) - 1), [B, 2], which falls from 1 at e = 0 to 0; k is ``scale``."""
    x_B2 = scale * error_B2
    is_small_B2 = x_B2 < _SMALL
    small_B2 = 1 - x_B2 / 2 + x_B2**2 / 12 - x_B2**4 / 720
    safe_B2 = x_B2.where(~is_small_B2, 1)  # else the gradient of the unused branch is NaN
    return small_B2.where(is_small_B2, safe_B2 * (-safe_B2).exp() / -(-safe_B2).expm1())


def mapo_loss(
    error_B2: torch.Tensor, label_B: torch.Tensor, *, margin_weight: float, scale: float, num_train_timesteps: int
) -> torch.Tensor:
    """Compute e_w - margin_weight log sigmoid(T (phi(e_w) - phi(e_l))), [B], with w the preferred image, l the other.

    Args:
        error_B2: errors of the policy.
        label_B: the annotator's P(image_0 preferred), no ties.
        margin_weight: weight of the margin term.
        scale: k of :func:`mapo_score`.
        num_train_timesteps: T.
    """
    preferred_B = label_B - TIE
    score_B2 = mapo_score(error_B2, scale)
    margin_B = (score_B2[:, 0] - score_B2[:, 1]) * preferred_B.sign()
    margin_loss_B = -functional.logsigmoid(num_train_timesteps * margin_B)
    return select_preferred(error_B2, preferred_B) + margin_weight * margin_loss_B


class MaPOOptions(ObjectiveOptions):
    """Options of MaPO; the defaults are those of the published code (``beta_mapo``, ``snr_value``)."""

    margin_weight: float = Field(0.1, ge=0, description="weight of the margin term; default 0.1")
    scale: float = Field(0.5, gt=0, description="k in the score k e / (exp(k e) - 1); default 0.5")


class MaPO(LabelObjective):
    """See :func:`mapo_loss`."""

    name: ClassVar[str] = "mapo"
    summary: ClassVar[str] = "labels, margin without a reference (MaPO, arXiv 2406.06424)"
    published_shards: ClassVar[Mapping[str, object]] = {**FORWARD, "prompt_dropout": 0.0}
    uses_reference: ClassVar[bool] = False
    Options: ClassVar[type[ObjectiveOptions]] = MaPOOptions
    options: MaPOOptions

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return mapo_loss(
            batch.error_B2,
            batch.label_B,
            margin_weight=self.options.margin_weight,
            scale=self.options.scale,
            num_train_timesteps=self.options.num_train_timesteps,
        )
