"""Diffusion-NPO (arXiv 2505.11245): reversed preferences train a model to guide away from.

The published method exchanges the two images of a pair and keeps the loss. The result replaces the unconditional model
in classifier-free guidance. Metrics refer to the reversed preference: rewards and accuracies rise if training works.

The published code uses beta 500 for Stable Diffusion 1.5 in a margin without our factor 1/2, hence 1000 here. It keeps
ties, with their images in a fixed order, which trains on noise; this implementation drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from smpo_trainer.objectives.base import FORWARD, PairBatch
from smpo_trainer.objectives.dpo import DPO, dpo_loss


class NPO(DPO):
    """The loss and options of Diffusion-DPO, with 1 - label as label."""

    name: ClassVar[str] = "npo"
    summary: ClassVar[str] = "reversed labels, for a negative-guidance model (Diffusion-NPO, arXiv 2505.11245)"
    trains_negative: ClassVar[bool] = True
    published_shards: ClassVar[Mapping[str, object]] = {**FORWARD, "prompt_dropout": 0.0}
    betas: ClassVar[Mapping[str, float]] = {"sd15": 1000.0, "sd2": 1000.0, "sdxl": 2000.0}

    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """See the base class; the image that the annotator did not prefer."""
        return -super().preferred(batch)

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return dpo_loss(self.margin(batch), 1 - batch.label_B, self.options.label_smoothing)
