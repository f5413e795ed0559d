"""Images that the model made itself: the noise that they began from, or the sampler's own states."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from smpo_pipeline.inversion.batch import Batch, Visit
from smpo_pipeline.inversion.sources.forward import noised_visit


def tracked_visits(batch: Batch) -> Iterator[Visit]:
    """Noise-tracked pairs (arXiv 2605.09433): each image's own initial noise, added to what the sampler made of it."""
    pairs = zip(batch.generated, batch.trajectories, strict=True)
    noise = torch.cat([pair.initial_noise(trajectory.pair.prompt) for pair, trajectory in pairs]).to(batch.device)
    for index in range(batch.most_nodes()):
        yield noised_visit(batch, index, noise)


def sampled_visits(batch: Batch) -> Iterator[Visit]:
    """Visit the states that the sampler itself went through."""
    for index in range(batch.most_nodes()):
        rows, t, _ = batch.rows_at(index)
        states = [pair.latents_K2Chw[1 + index] for pair in batch.generated if index < len(pair.timesteps)]
        yield Visit(index, rows, t, torch.from_numpy(np.concatenate(states)).to(batch.device), None, None)
