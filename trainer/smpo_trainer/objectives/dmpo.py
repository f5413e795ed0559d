"""Divergence minimization preference optimization (DMPO, arXiv 2507.07510): the reverse KL divergence.

DPO minimises KL(labels || model), which covers all labelled modes; DMPO minimises KL(model || labels), which seeks one
mode. On pairs it is the loss of EXO (arXiv 2402.00856) with the margin of Diffusion-DPO. Only smoothed labels make it
finite. The default smoothing and beta are those of the only public implementation (AIDC-AI/Diffusion-SDPO); the
authors' values were not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from smpo_trainer.objectives.base import DPO_BETAS, FORWARD, LabelObjective, ObjectiveOptions, PairBatch, smoothed_label


def dmpo_loss(margin_B: torch.Tensor, label_B: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Compute KL(model || label) = P log(P / q) + (1 - P) log((1 - P) / (1 - q)), P = sigmoid(h), [B].

    Args:
        margin_B: h, the implicit reward margin of image_0.
        label_B: the annotator's P(image_0 preferred), no ties.
        label_smoothing: s > 0; q is 1 - s or s.
    """
    target_B = smoothed_label(label_B, label_smoothing)
    first_B = margin_B.sigmoid() * (functional.logsigmoid(margin_B) - target_B.log())
    second_B = (-margin_B).sigmoid() * (functional.logsigmoid(-margin_B) - (1 - target_B).log())
    return first_B + second_B


class DMPOOptions(ObjectiveOptions):
    """Options of DMPO."""

    label_smoothing: float = Field(0.01, gt=0, lt=0.5, description="assumed share of wrong labels; default 0.01")


class DMPO(LabelObjective):
    """See :func:`dmpo_loss`."""

    name: ClassVar[str] = "dmpo"
    summary: ClassVar[str] = "labels, reverse KL divergence (DMPO, arXiv 2507.07510)"
    published_shards: ClassVar[Mapping[str, object]] = FORWARD
    betas: ClassVar[Mapping[str, float]] = {**DPO_BETAS, "sdxl": 6000.0}
    Options: ClassVar[type[ObjectiveOptions]] = DMPOOptions
    options: DMPOOptions

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return dmpo_loss(self.margin(batch), batch.label_B, self.options.label_smoothing)
