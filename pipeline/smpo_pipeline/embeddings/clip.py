"""The CLIP whose embeddings are used."""

from __future__ import annotations

from typing import cast

from smpo_pipeline.rewards import Reward, load_reward
from smpo_pipeline.rewards.networks.clip import ClipCosineReward


def load_clip(spec: str, device: str) -> ClipCosineReward:
    """Load the CLIP that ``--features`` names.

    Raises:
        UserError: it cannot be loaded.
    """
    return cast("ClipCosineReward", load_reward(spec, device))


def clip_of(reward: Reward) -> ClipCosineReward | None:
    """Return the CLIP that a reward is, or has as its attribute ``clip``; None: it has none."""
    return reward if isinstance(reward, ClipCosineReward) else getattr(reward, "clip", None)
