"""Where states come from (``--source``): ReNoise walks, or forward noising."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from smpo_models.process import START
from smpo_pipeline.inversion.batch import Batch, Visit
from smpo_pipeline.inversion.draws import gaussian
from smpo_pipeline.inversion.solver import posterior_std, renoise_step


def renoise_visits(batch: Batch) -> Iterator[Visit]:
    """Carry x0 along the walker's sampling trajectory, node by node (arXiv 2403.14602).

    With ``--start T`` nodes up to T are reached by forward noising with one Gaussian noise a pair, and inverted from
    there on.
    """
    settings, process = batch.settings, batch.process
    inverted_from = settings.start if isinstance(settings.start, int) else START
    start_noise = batch.noise_a_pair("start")
    s_R = torch.full((len(batch.x0_RChw),), inverted_from, dtype=torch.int64, device=batch.device)
    x_RChw = batch.x0_RChw.clone() if settings.start == "clean" else process.noised(batch.x0_RChw, start_noise, s_R)
    eta_streams = [walk.stream("eta") for walk in batch.walks]
    yield Visit(-1, torch.arange(len(x_RChw), device=batch.device), s_R.clone(), x_RChw.clone(), None)
    for index in range(max(len(walk.plan.nodes) for walk in batch.walks)):
        rows, t = batch.rows_at(index)
        x_s, s = x_RChw[rows], s_R[rows]
        stepped = t > inverted_from
        x_t = process.noised(batch.x0_RChw[rows], start_noise[rows], t)
        if stepped.any():
            predict = partial(batch.predicted_noise, t_S=t[stepped], rows_S=rows[stepped])
            x_t[stepped] = renoise_step(predict, process, x_s[stepped], s[stepped], t[stepped], settings.renoise_steps)
        if settings.eta:
            # DDIM-InPO (arXiv 2503.18454): fresh noise after each step, of the DDIM posterior's size.
            fresh = torch.cat([gaussian(stream, (2, *x_t.shape[1:])) for stream in eta_streams]).to(batch.device)
            sigma = posterior_std(process, s, t, x_t) * stepped[:, None, None, None]
            x_t = x_t + settings.eta * sigma * fresh[rows]
        x_RChw[rows], s_R[rows] = x_t, t
        yield Visit(index, rows, t, x_t, (x_s, s, stepped))


def forward_visits(batch: Batch) -> Iterator[Visit]:
    """Diffusion-DPO's estimate (arXiv 2311.12908, section 4): Gaussian noise, the same for both images of a pair."""
    streams = [walk.stream("forward") for walk in batch.walks]
    shape = (1, *batch.x0_RChw.shape[1:])
    for index in range(-1, max(len(walk.plan.nodes) for walk in batch.walks)):
        rows, _ = batch.rows_at(index) if index >= 0 else (torch.arange(2 * len(streams), device=batch.device), None)
        noise = torch.cat([gaussian(stream, shape).repeat(2, 1, 1, 1) for stream in streams]).to(batch.device)
        positions, used_at = batch.stored_at(index, rows)
        stored = rows[positions]
        x_t = batch.process.noised(batch.x0_RChw[stored], noise[stored], used_at)
        yield Visit(index, stored, used_at, x_t, None)


SOURCES: dict[str, Callable[[Batch], Iterator[Visit]]] = {"renoise": renoise_visits, "forward": forward_visits}
"""By the names that ``--source`` takes."""
