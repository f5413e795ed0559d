"""Metrics by timestep: which noise levels a run learns at, and where it drifts.

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
"""What is looked at by band: what is learned, and how far the model's errors have drifted from the reference's."""


def bands(num_train_timesteps: int) -> list[range]:
    """The timesteps 0 .. T - 1 in :data:`NUM_BANDS` equal parts, in order (to a timestep, where T does not divide)."""
    edges = [number * num_train_timesteps // NUM_BANDS for number in range(NUM_BANDS + 1)]
    return [range(first, stop) for first, stop in pairwise(edges)]


def banded_name(name: str, band: range) -> str:
    """As what a metric is logged for a band: ``rewards/margins/t250-499``, both ends included."""
    return f"{name}/t{band.start}-{band.stop - 1}"


def by_band(metrics: Metrics, timestep_B: torch.Tensor, num_train_timesteps: int) -> Metrics:
    """The metrics :data:`BANDED` once for each band: NaN for the states of other bands, which a mean leaves out.

    Args:
        metrics: per-pair values, each [B].
        timestep_B: int64.
        num_train_timesteps: T of the model's noise levels.
    """
    found: Metrics = {}
    for band in bands(num_train_timesteps):
        inside_B = (timestep_B >= band.start) & (timestep_B < band.stop)
        found |= {banded_name(name, band): metrics[name].where(inside_B, torch.nan) for name in BANDED}
    return found
