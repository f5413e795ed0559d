"""Images noised by drawn noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smpo_models.draws import gaussian
from smpo_pipeline.inversion.batch import Batch, Visit


def forward_visits(batch: Batch) -> Iterator[Visit]:
    """Diffusion-DPO's estimate (arXiv 2311.12908, section 4): Gaussian noise, the same for both images of a pair.

    With ``--forward-noise image`` each image has its own, as in CaPO (arXiv 2502.02588).
    """
    own = batch.settings.forward_noise == "image"
    streams = [trajectory.stream("forward/image" if own else "forward") for trajectory in batch.trajectories]
    shape = (2 if own else 1, *batch.x0_RChw.shape[1:])
    for stream in streams:
        gaussian(stream, shape)  # discarded: a seed gives the same draws as when the start was still a stored state
    for index in range(batch.most_nodes()):
        noise = torch.cat([gaussian(stream, shape).expand(2, -1, -1, -1) for stream in streams]).to(batch.device)
        yield noised_visit(batch, index, noise)


def noised_visit(batch: Batch, index: int, noise_RChw: torch.Tensor) -> Visit:
    """Visit the ``index``-th nodes by adding noise to x0, where their states are stored."""
    rows, _, _ = batch.rows_at(index)
    positions, used_at = batch.stored_at(index, rows)
    stored = rows[positions]
    x_t = batch.noise_schedule.noised(batch.x0_RChw[stored], noise_RChw[stored], used_at)
    return Visit(index, stored, used_at, x_t, None, None, noise_RChw[stored])
