"""CLIPScore (arXiv 2104.08718) without its rescaling 2.5 max(0, cosine): the raw cosine of a stock CLIP."""

from __future__ import annotations

from typing import ClassVar

from smpo_pipeline.rewards.networks.clip import ClipCosineReward


class ClipScore(ClipCosineReward):
    """Raw cosine between image and prompt."""

    name: ClassVar[str] = "clipscore"
    default_model: ClassVar[str | None] = "openai/clip-vit-large-patch14"
