"""Supervised fine-tuning on the preferred images: a baseline, and the start of the published SD 1.5 runs.

The other image of each pair also goes through the forward pass, for the metrics.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from smpo_schemas.labels import TIE
from smpo_trainer.objectives.base import LabelObjective, PairBatch, select_preferred


def sft_loss(error_B2: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """Compute the denoising loss of the preferred image, [B] (DDPM, arXiv 2006.11239, equation 14).

    Args:
        error_B2: errors of the policy.
        label_B: the annotator's P(image_0 preferred), no ties.
    """
    return select_preferred(error_B2, label_B - TIE)


class SFT(LabelObjective):
    """See :func:`sft_loss`."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "fine-tuning on the preferred images, no reference"
    uses_reference: ClassVar[bool] = False

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return sft_loss(batch.error_B2, batch.label_B)
