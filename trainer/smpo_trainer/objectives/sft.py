"""Supervised fine-tuning on the preferred images: the baseline, and where the published SD 1.5 runs start from.

The other image goes through the forward pass as well, for what is logged.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from smpo_schemas.labels import TIE
from smpo_trainer.objectives.base import LabelObjective, PairBatch, of_preferred


def sft_loss(error_B2: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """The denoising loss of the preferred image (DDPM, arXiv 2006.11239, equation 14), [B].

    Args:
        error_B2: the trained model's errors.
        label_B: the annotator's P(image_0 preferred), decided.
    """
    return of_preferred(error_B2, label_B - TIE)


class SFT(LabelObjective):
    """See :func:`sft_loss`."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "fine-tuning on the preferred images, no reference"
    uses_reference: ClassVar[bool] = False

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return sft_loss(batch.error_B2, batch.label_B)
