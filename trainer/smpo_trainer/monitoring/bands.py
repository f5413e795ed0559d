"""Metrics by band of timesteps: at which noise levels a run learns, and where it drifts.

Shape suffixes: B a batch of states.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from smpo_trainer.objectives.base import Metrics

NUM_BANDS = 4

BANDED = (
    "rewards/margins",
    "rewards/accuracies",
    "error_minus_reference/image_0",
    "error_minus_reference/image_1",
)
"""Metrics that are also logged by band: learning, and drift of the errors from those of the reference."""


def bands(num_train_timesteps: int) -> list[range]:
    """Split the timesteps 0 .. T - 1 into :data:`NUM_BANDS` bands of equal size (up to one timestep)."""
    edges = [number * num_train_timesteps // NUM_BANDS for number in range(NUM_BANDS + 1)]
    return [range(first, stop) for first, stop in pairwise(edges)]


def banded_name(name: str, band: range) -> str:
    """Name a metric of a band, for example ``rewards/margins/t250-499``, both ends included."""
    return f"{name}/t{band.start}-{band.stop - 1}"


def by_band(metrics: Metrics, timestep_B: torch.Tensor, num_train_timesteps: int) -> Metrics:
    """Split the metrics :data:`BANDED` by band; states of other bands have NaN, which the mean leaves out.

    Args:
        metrics: per-pair values, each [B].
        timestep_B: int64 (float32 for flow-matching models).
        num_train_timesteps: T, the length of the noise schedule.
    """
    banded: Metrics = {}
    for band in bands(num_train_timesteps):
        inside_B = (timestep_B >= band.start) & (timestep_B < band.stop)
        banded |= {banded_name(name, band): metrics[name].where(inside_B, torch.nan) for name in BANDED}
    return banded
