"""PickScore (arXiv 2305.01569): a CLIP-H fine-tuned on Pick-a-Pic's choices."""

from __future__ import annotations

from typing import ClassVar

from smpo_pipeline.rewards.networks.clip import ClipCosineReward


class PickScore(ClipCosineReward):
    """Raw cosine; the model card's score is 100 times this (its logit scale)."""

    name: ClassVar[str] = "pickscore"
    default_model: ClassVar[str | None] = "yuvalkirstain/PickScore_v1"
    processor_model: ClassVar[str | None] = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
