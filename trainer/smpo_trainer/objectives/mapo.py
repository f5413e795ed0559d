"""Margin-aware preference optimization (MaPO, arXiv 2406.06424), in the form of its published code.

No reference: an image's score is a bounded, falling function of the model's own error, and the preferred image's error
is minimised beside the margin. What is logged compares with the stored reference all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from smpo_schemas.labels import TIE
from smpo_trainer.objectives.base import FORWARD, LabelObjective, ObjectiveOptions, PairBatch, of_preferred

_SMALL = 0.01
"""Below, the quotient and its gradient cancel, down to 0/0, and the series' next term, x^6 / 30240, is below 1e-16."""


def mapo_score(error_B2: torch.Tensor, scale: float) -> torch.Tensor:
    """phi(e) = k e / (exp(k e) - 1), [B, 2]: 1 at e = 0, falling to 0; k is ``scale``."""
    x_B2 = scale * error_B2
    is_small_B2 = x_B2 < _SMALL
    small_B2 = 1 - x_B2 / 2 + x_B2**2 / 12 - x_B2**4 / 720
    safe_B2 = x_B2.where(~is_small_B2, 1)  # the branch not taken would make NaN of the gradient
    return small_B2.where(is_small_B2, safe_B2 * (-safe_B2).exp() / -(-safe_B2).expm1())


def mapo_loss(
    error_B2: torch.Tensor, label_B: torch.Tensor, *, margin_weight: float, scale: float, num_train_timesteps: int
) -> torch.Tensor:
    """e_w - margin_weight log sigmoid(T (phi(e_w) - phi(e_l))), [B], w the preferred image and l the other.

    Args:
        error_B2: the trained model's errors.
        label_B: the annotator's P(image_0 preferred), decided.
        margin_weight: weight of the margin's term.
        scale: k of :func:`mapo_score`.
        num_train_timesteps: T.
    """
    preferred_B = label_B - TIE
    score_B2 = mapo_score(error_B2, scale)
    margin_B = (score_B2[:, 0] - score_B2[:, 1]) * preferred_B.sign()
    return of_preferred(error_B2, preferred_B) - margin_weight * functional.logsigmoid(num_train_timesteps * margin_B)


class MaPOOptions(ObjectiveOptions):
    """See the fields; defaults are those of the published code (``beta_mapo``, ``snr_value``)."""

    margin_weight: float = Field(0.1, ge=0, description="weight of the margin beside the error; default 0.1")
    scale: float = Field(0.5, gt=0, description="k in the score k e / (exp(k e) - 1); default 0.5")


class MaPO(LabelObjective):
    """See :func:`mapo_loss`."""

    name: ClassVar[str] = "mapo"
    summary: ClassVar[str] = "labels, the model's own margin without a reference (MaPO, arXiv 2406.06424)"
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
