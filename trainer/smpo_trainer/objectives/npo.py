"""Diffusion-NPO (arXiv 2505.11245): the preference reversed, for a model to guide away from.

The published method trains with the two images of a pair exchanged and leaves the loss as it is. The result takes the
unconditional model's place in classifier-free guidance. What is logged is seen from the reversed preference: rewards
and accuracies rise where training works.

The published code has beta 500 for Stable Diffusion 1.5, in a margin without the 1/2 of ours, hence 1000 here. It keeps
ties, with their images in one fixed order, which teaches noise; ours drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from smpo_trainer.objectives.base import FORWARD, PairBatch
from smpo_trainer.objectives.dpo import DPO, dpo_loss


class NPO(DPO):
    """Diffusion-DPO's loss with label 1 - label; its options too."""

    name: ClassVar[str] = "npo"
    summary: ClassVar[str] = "labels reversed, for a negative-guidance model (Diffusion-NPO, arXiv 2505.11245)"
    published_shards: ClassVar[Mapping[str, object]] = {**FORWARD, "prompt_dropout": 0.0}
    betas: ClassVar[Mapping[str, float]] = {"sd15": 1000.0, "sd2": 1000.0, "sdxl": 2000.0}

    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """See the base class: the image that the annotator did not prefer."""
        return -super().preferred(batch)

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return dpo_loss(self.margin(batch), 1 - batch.label_B, self.options.label_smoothing)
