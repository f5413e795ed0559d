"""Linear-DPO (arXiv 2605.21123), as in its published code: Diffusion-DPO with a linear weight for its sigmoid.

Diffusion-DPO's gradient is that of the difference of the errors, e_w - e_l, times a logistic function of the margin,
which vanishes for pairs that are learned. Here the weight falls linearly with the margin and stays between eta and
1 - eta. Unlike in Diffusion-DPO it is not multiplied by beta / 2, so learning rates are hundreds of times larger.

The published reference is a moving average of the model in training (decay 0.95 to 0.99); shards have the errors of a
fixed reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from smpo_schemas.labels import TIE
from smpo_trainer.objectives.base import FORWARD, LabelObjective, ObjectiveOptions, PairBatch

_SLOPE = 0.4
"""The published 0.2 beta, per unit of the margin, which has the factor beta / 2."""


def linear_dpo_loss(error_B2: torch.Tensor, margin_B: torch.Tensor, label_B: torch.Tensor, eta: float) -> torch.Tensor:
    """Compute w (e_w - e_l), [B], with w = clip(1/2 - 0.4 s h, eta, 1 - eta), a constant to the gradient.

    Its value is not comparable between steps: only its gradient matters.

    Args:
        error_B2: errors of the policy.
        margin_B: h, the implicit reward margin of image_0.
        label_B: the annotator's P(image_0 preferred), no ties; s is its sign around 1/2.
        eta: smallest weight of a pair.
    """
    sign_B = (label_B - TIE).sign()
    weight_B = (0.5 - _SLOPE * sign_B * margin_B.detach()).clamp(eta, 1 - eta)
    return weight_B * sign_B * (error_B2[:, 0] - error_B2[:, 1])


class LinearDPOOptions(ObjectiveOptions):
    """Options of Linear-DPO."""

    eta: float = Field(
        1e-3,
        ge=0,
        lt=0.5,
        description="smallest weight of a pair, and 1 minus the largest; default 0.001 as for SD 1.5; for SDXL 0",
    )


class LinearDPO(LabelObjective):
    """See :func:`linear_dpo_loss`."""

    name: ClassVar[str] = "linear-dpo"
    summary: ClassVar[str] = "labels, a linear weight for the sigmoid (Linear-DPO, arXiv 2605.21123)"
    published_shards: ClassVar[Mapping[str, object]] = FORWARD
    betas: ClassVar[Mapping[str, float]] = {"sd15": 100.0, "sd2": 100.0, "sdxl": 500.0}
    Options: ClassVar[type[ObjectiveOptions]] = LinearDPOOptions
    options: LinearDPOOptions

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return linear_dpo_loss(batch.error_B2, self.margin(batch), batch.label_B, self.options.eta)
