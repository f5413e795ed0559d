"""ReNoise trajectories: images carried along the model's own sampling trajectory, backwards."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from smpo_models.draws import gaussian
from smpo_models.noise_schedules.base import START
from smpo_pipeline.inversion.batch import Batch, Visit
from smpo_pipeline.inversion.solvers import SOLVERS
from smpo_pipeline.inversion.step import Predict, Step


def renoise_visits(batch: Batch) -> Iterator[Visit]:
    """Carry x0 along the sampling trajectory, node by node, with the solver that the settings name.

    With ``--start T``, nodes up to T are reached by forward noising with one Gaussian noise per pair; inversion starts
    from there.
    """
    settings, schedule = batch.settings, batch.noise_schedule
    inverted_from = settings.start if isinstance(settings.start, int) else START
    start_noise = batch.noise_per_pair("start")
    s_R = torch.full((len(batch.x0_RChw),), inverted_from, dtype=schedule.timestep_dtype, device=batch.device)
    x_RChw = batch.x0_RChw.clone() if settings.start == "clean" else schedule.noised(batch.x0_RChw, start_noise, s_R)
    eta_streams = [trajectory.stream("eta") for trajectory in batch.trajectories]
    for index in range(batch.most_nodes()):
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
            sigma = schedule.step_std(s, t, x_t) * stepped[:, None, None, None]
            x_t = x_t + settings.eta * sigma * fresh[rows]
        x_RChw[rows], s_R[rows] = x_t, t
        yield Visit(index, rows, t, x_t, (x_s, s, asked, stepped), solved)


def _predict_at(batch: Batch, t_R: torch.Tensor, rows_R: torch.Tensor) -> Predict:
    """Return the inverting denoiser's predictions for a step of the given rows, evaluated at the given timesteps."""
    return lambda x_NChw, rows_N: batch.predicted_direction(x_NChw, t_R[rows_N], rows_R[rows_N])
