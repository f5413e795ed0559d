"""Identity preference optimization (arXiv 2310.12036, equation 17) with the margin of Diffusion-DPO.

The paper regresses the log-ratio margin to 1 / (2 tau). Here h is already scaled by beta in place of tau, and the loss
is the paper's times that scale squared, which keeps it as large as those of the other objectives.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from smpo_schemas.labels import TIE
from smpo_trainer.objectives.base import LabelObjective, PairBatch


def ipo_loss(margin_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """Compute (sign(label - 1/2) h - 1/2)^2, [B]. Unlike in DPO, a margin beyond 1/2 is pulled back.

    Args:
        margin_B: h, the implicit reward margin of image_0.
        label_B: the annotator's P(image_0 preferred), no ties.
    """
    return ((label_B - TIE).sign() * margin_B - 1 / 2).square()


class IPO(LabelObjective):
    """See :func:`ipo_loss`."""

    name: ClassVar[str] = "ipo"
    summary: ClassVar[str] = "labels, regression of the margin to 1/2 (IPO, arXiv 2310.12036)"

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return ipo_loss(self.margin(batch), batch.label_B)
