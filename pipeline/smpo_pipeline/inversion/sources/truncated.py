"""Truncated sampling (Self-NPO, arXiv 2505.11777): the model's own estimates of x0, and states noised again from there.

A few steps of the sampler lead from the noised image (the paper's text: from pure noise) to x_t. The estimate of x0 at
x_t becomes the x0 of the trajectory; its states are x_t, noised further to timesteps s above t.

Shape suffixes: R rows of the batch, S some of them, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smpo_models.draws import gaussian
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_pipeline.inversion.batch import Batch, Visit
from smpo_schemas.shards.samples import STORAGE


def truncated_visits(batch: Batch) -> Iterator[Visit]:
    """Estimate x0 by a few steps of the model's own sampling, in place of the batch's, and noise x_t further."""
    t_R, x0_RChw, noise_RChw = estimates(batch)
    batch.x0_RChw = x0_RChw.to(STORAGE[batch.settings.storage]).float()
    streams = [trajectory.stream("truncated/noise again") for trajectory in batch.trajectories]
    shape = (2, *x0_RChw.shape[1:])
    for index in range(batch.most_nodes()):
        rows, s, _ = batch.rows_at(index)
        fresh = torch.cat([gaussian(stream, shape) for stream in streams]).to(batch.device)
        tau = noised_again(batch.noise_schedule, noise_RChw[rows], fresh[rows], t_R[rows], s)
        yield Visit(index, rows, s, batch.noise_schedule.noised(batch.x0_RChw[rows], tau, s), None, None, tau)


def noised_again(
    schedule: NoiseSchedule, noise_SChw: torch.Tensor, fresh_SChw: torch.Tensor, t_S: torch.Tensor, s_S: torch.Tensor
) -> torch.Tensor:
    """Return the noise in x_s, which is x_t noised further: r noise + sqrt(1 - r^2) fresh, r = a_s s_t / (a_t s_s).

    That is (x_s - a_s x0) / s_s of x_s = (a_s / a_t) x_t + sqrt(s_s^2 - s_t^2 a_s^2 / a_t^2) fresh.

    Args:
        schedule: noise levels.
        noise_SChw: the noise in x_t.
        fresh_SChw: standard normal.
        t_S: timesteps of x_t.
        s_S: those of x_s, above t.
    """
    a_t, s_t = schedule.levels(t_S, noise_SChw)
    a_s, s_s = schedule.levels(s_S, noise_SChw)
    r = a_s * s_t / (a_t * s_s)
    return r * noise_SChw + (1 - r.square()).clamp_min(0).sqrt() * fresh_SChw


def estimates(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return t [R], and the estimates of x0 and of the noise at x_t, by the sampler's first-order steps down to x_t."""
    schedule, shape = batch.noise_schedule, (2, *batch.x0_RChw.shape[1:])
    start = torch.cat([gaussian(trajectory.stream("truncated/noise"), shape) for trajectory in batch.trajectories])
    rows = torch.arange(len(batch.x0_RChw), device=batch.device)
    x = noise = start.to(batch.device)
    x0 = batch.x0_RChw
    for number, t in enumerate(batch.sampled_at()):
        if number > 0 or batch.settings.truncated_from == "image":
            # DDIM's step (arXiv 2010.02502, eq. 12), and Euler's of flow models; first the image's own noising.
            x = schedule.noised(x0, noise, t)
        output = batch.predicted(x, t, rows)
        x0, noise = schedule.x0_in(output, x, t), schedule.noise_in(output, x, t)
    return t, x0, noise
