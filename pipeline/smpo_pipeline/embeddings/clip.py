"""The CLIP whose embeddings are used."""

from __future__ import annotations

from typing import cast

from smpo_pipeline.rewards import load_reward
from smpo_pipeline.rewards.networks.clip import ClipCosineReward


def load_clip(spec: str, device: str) -> ClipCosineReward:
    """Load the CLIP that ``--features`` names.

    Raises:
        UserError: it cannot be loaded.
    """
    return cast("ClipCosineReward", load_reward(spec, device))
