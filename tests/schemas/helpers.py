"""Rewards without models."""

from __future__ import annotations

import numpy as np

from smpo_schemas.scores import RewardStatistics, reward_statistics


def statistics(scores, labels=None, fingerprint="f") -> RewardStatistics:
    """Of scores [P, 2], and labels [P] where there are any."""
    labels = np.full(len(scores), np.nan) if labels is None else np.asarray(labels, dtype=float)
    return reward_statistics(np.asarray(scores), labels, model="m", fingerprint=fingerprint, unit="cosine")
