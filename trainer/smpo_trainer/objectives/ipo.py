"""Identity preference optimization (arXiv 2310.12036, equation 17) with Diffusion-DPO's margin.

The paper regresses the log-ratio margin to 1 / (2 tau). Here h holds the scale beta in tau's place, and the loss is the
paper's times that scale squared, so that it stays of the size of the other objectives'.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from smpo_schemas.labels import TIE
from smpo_trainer.objectives.base import LabelObjective, PairBatch


def ipo_loss(margin_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """(sign(label - 1/2) h - 1/2)^2, [B]: a margin beyond 1/2 is drawn back, unlike DPO's.

    Args:
        margin_B: h, the implicit reward margin of image_0.
        label_B: the annotator's P(image_0 preferred), decided.
    """
    return ((label_B - TIE).sign() * margin_B - 1 / 2).square()


class IPO(LabelObjective):
    """See :func:`ipo_loss`."""

    name: ClassVar[str] = "ipo"
    summary: ClassVar[str] = "labels, the margin regressed to 1/2 (IPO, arXiv 2310.12036)"

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return ipo_loss(self.margin(batch), batch.label_B)
