"""Statistics of rewards without models."""

from __future__ import annotations

import numpy as np

from smpo_schemas.scoring.scores import RewardStatistics, reward_statistics


def statistics(scores, labels=None, fingerprint="f") -> RewardStatistics:
    """Describe scores [P, 2], with labels [P] if given."""
    labels = np.full(len(scores), np.nan) if labels is None else np.asarray(labels, dtype=float)
    return reward_statistics(np.asarray(scores), labels, model="m", fingerprint=fingerprint, unit="cosine")
