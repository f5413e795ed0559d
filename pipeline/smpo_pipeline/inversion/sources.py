"""Where states come from (``--source``): ReNoise trajectories, forward noising, or the sampler that made the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from smpo_models.draws import gaussian
from smpo_models.noise_schedules.base import START
from smpo_pipeline.inversion.batch import Batch, Visit
from smpo_pipeline.inversion.solvers import SOLVERS
from smpo_pipeline.inversion.step import Predict, Step, posterior_std


def renoise_visits(batch: Batch) -> Iterator[Visit]:
    """Carry x0 along the sampling trajectory, node by node, with the solver that the settings name.

    With ``--start T`` nodes up to T are reached by forward noising with one Gaussian noise a pair, and inverted from
    there on.
    """
    settings, schedule = batch.settings, batch.noise_schedule
    inverted_from = settings.start if isinstance(settings.start, int) else START
    start_noise = batch.noise_a_pair("start")
    s_R = torch.full((len(batch.x0_RChw),), inverted_from, dtype=schedule.timestep_dtype, device=batch.device)
    x_RChw = batch.x0_RChw.clone() if settings.start == "clean" else schedule.noised(batch.x0_RChw, start_noise, s_R)
    eta_streams = [trajectory.stream("eta") for trajectory in batch.trajectories]
    for index in range(_most_nodes(batch)):
        rows, t, asked = batch.rows_at(index)
        x_s, s = x_RChw[rows], s_R[rows]
        stepped = t > inverted_from
        x_t = schedule.noised(batch.x0_RChw[rows], start_noise[rows], t)
        solved = None
        if stepped.any():
            predict = _predict_at(batch, asked[stepped], rows[stepped])
            step = Step(predict, schedule, x_s[stepped], s[stepped], t[stepped])
            solution = SOLVERS[settings.solver](step, settings)
            x_t[stepped] = solution.x_RChw
            if solution.residual_R is not None:
                solved = torch.full((len(rows),), torch.nan, device=batch.device)
                solved[stepped] = solution.residual_R
        if settings.eta:
            # DDIM-InPO (arXiv 2503.18454): fresh noise after each step, of the DDIM posterior's size.
            fresh = torch.cat([gaussian(stream, (2, *x_t.shape[1:])) for stream in eta_streams]).to(batch.device)
            sigma = posterior_std(schedule, s, t, x_t) * stepped[:, None, None, None]
            x_t = x_t + settings.eta * sigma * fresh[rows]
        x_RChw[rows], s_R[rows] = x_t, t
        yield Visit(index, rows, t, x_t, (x_s, s, asked, stepped), solved)


def _predict_at(batch: Batch, t_R: torch.Tensor, rows_R: torch.Tensor) -> Predict:
    """The inverting denoiser's predictions for a step of the given rows of the batch, asked at the given timesteps."""
    return lambda x_NChw, rows_N: batch.predicted_direction(x_NChw, t_R[rows_N], rows_R[rows_N])


def forward_visits(batch: Batch) -> Iterator[Visit]:
    """Diffusion-DPO's estimate (arXiv 2311.12908, section 4): Gaussian noise, the same for both images of a pair.

    With ``--forward-noise image`` each image has its own, as in CaPO (arXiv 2502.02588).
    """
    own = batch.settings.forward_noise == "image"
    streams = [trajectory.stream("forward/image" if own else "forward") for trajectory in batch.trajectories]
    shape = (2 if own else 1, *batch.x0_RChw.shape[1:])
    for stream in streams:
        gaussian(stream, shape)  # not used: it keeps a seed's draws what they were when the start was a state, too
    for index in range(_most_nodes(batch)):
        noise = torch.cat([gaussian(stream, shape).expand(2, -1, -1, -1) for stream in streams]).to(batch.device)
        yield _noised(batch, index, noise)


def tracked_visits(batch: Batch) -> Iterator[Visit]:
    """Noise-tracked pairs (arXiv 2605.09433): each image's own initial noise, added to what the sampler made of it."""
    pairs = zip(batch.generated, batch.trajectories, strict=True)
    noise = torch.cat([pair.initial_noise(trajectory.pair.prompt) for pair, trajectory in pairs]).to(batch.device)
    for index in range(_most_nodes(batch)):
        yield _noised(batch, index, noise)


def sampled_visits(batch: Batch) -> Iterator[Visit]:
    """The states that the sampler itself went through."""
    for index in range(_most_nodes(batch)):
        rows, t, _ = batch.rows_at(index)
        states = [pair.latents_K2Chw[1 + index] for pair in batch.generated if index < len(pair.timesteps)]
        yield Visit(index, rows, t, torch.from_numpy(np.concatenate(states)).to(batch.device), None, None)


def _noised(batch: Batch, index: int, noise_RChw: torch.Tensor) -> Visit:
    """Visit the ``index``-th nodes by adding noise to x0, where their states are stored."""
    rows, _, _ = batch.rows_at(index)
    positions, used_at = batch.stored_at(index, rows)
    stored = rows[positions]
    x_t = batch.noise_schedule.noised(batch.x0_RChw[stored], noise_RChw[stored], used_at)
    return Visit(index, stored, used_at, x_t, None, None, noise_RChw[stored])


def _most_nodes(batch: Batch) -> int:
    return max(len(trajectory.plan.nodes) for trajectory in batch.trajectories)


SOURCES: dict[str, Callable[[Batch], Iterator[Visit]]] = {
    "renoise": renoise_visits,
    "forward": forward_visits,
    "tracked": tracked_visits,
    "sampled": sampled_visits,
}
"""By the names that ``--source`` takes."""
