"""One step of inversion, x_s to x_t: F(x_s, eps) = a_t (x_s - s_s eps) / a_s + s_t eps.

Source: ReNoise, arXiv 2403.14602, section 3 and algorithm 1. The exact x_t solves x_t = F(x_s, eps(x_t, t)); the
model is always evaluated at the step's end point t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from smpo_models.process import Process

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Noise that the walker sees in x, [R, C, h, w], at the step's end points."""


def carry(process: Process, x_s: torch.Tensor, eps: torch.Tensor, s_R: torch.Tensor, t_R: torch.Tensor) -> torch.Tensor:
    """F(x_s, eps): DDIM's update from level s to level t, for R rows with levels of their own."""
    a_s, s_s = process.levels(s_R, x_s)
    a_t, s_t = process.levels(t_R, x_s)
    return a_t * (x_s - s_s * eps) / a_s + s_t * eps


def renoise_step(
    predict: Predict, process: Process, x_s: torch.Tensor, s_R: torch.Tensor, t_R: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Carry x_s to x_t with ``iterations`` ReNoise iterations (0: DDIM inversion).

    The step is taken with the mean of the last two estimates of eps(x_t, t): with one iteration that is
    (e_0 + e_1) / 2, as the published SmPO code does.
    """
    previous = estimate = predict(x_s)
    for _ in range(iterations):
        previous, estimate = estimate, predict(carry(process, x_s, estimate, s_R, t_R))
    return carry(process, x_s, (previous + estimate) / 2, s_R, t_R)


def posterior_std(process: Process, s_R: torch.Tensor, t_R: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """DDIM's posterior standard deviation between levels s < t (arXiv 2010.02502, eq. 16, eta = 1): [R, 1, 1, 1]."""
    a_s, s_s = process.levels(s_R, like)
    a_t, s_t = process.levels(t_R, like)
    return (s_s / s_t) * (1 - (a_t / a_s) ** 2).clamp_min(0).sqrt()
