"""One step of inversion, x_s to x_t: F(x_s, eps) = a_t (x_s - s_s eps) / a_s + s_t eps.

The exact x_t is a fixed point: x_t = F(x_s, eps(x_t, t)). The model is evaluated at the step's end point t; only under
``--timesteps published`` is it told another timestep, the one that the step starts from.

Shape suffixes: R rows of the step, N some of them, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from smpo_models.noise_schedule import Process

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Noise that the inverting denoiser predicts in x [N, C, h, w] of the rows int64 [N], at their steps' timesteps."""


def carry(process: Process, x_s: torch.Tensor, eps: torch.Tensor, s_R: torch.Tensor, t_R: torch.Tensor) -> torch.Tensor:
    """F(x_s, eps): DDIM's update from level s to level t (arXiv 2010.02502, eq. 12), for rows with levels of their own.

    With s and t exchanged it is the step of DDIM sampling.
    """
    a_s, s_s = process.levels(s_R, x_s)
    a_t, s_t = process.levels(t_R, x_s)
    return a_t * (x_s - s_s * eps) / a_s + s_t * eps


def distance(x_NChw: torch.Tensor, image_NChw: torch.Tensor) -> torch.Tensor:
    """||x - image|| / ||x|| of each row: the residual, where ``image`` is F(x_s, eps(x, t)): [N]."""
    return (x_NChw - image_NChw).flatten(1).norm(dim=1) / x_NChw.flatten(1).norm(dim=1)


def posterior_std(process: Process, s_R: torch.Tensor, t_R: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """DDIM's posterior standard deviation between levels s < t (arXiv 2010.02502, eq. 16, eta = 1): [R, 1, 1, 1]."""
    a_s, s_s = process.levels(s_R, like)
    a_t, s_t = process.levels(t_R, like)
    return (s_s / s_t) * (1 - (a_t / a_s) ** 2).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Step:
    """R rows that are to be carried from x_s at level s to level t.

    Attributes:
        predict: the inverting denoiser's noise prediction.
        process: noise levels.
        x_s_RChw: float32, where the rows are.
        s_R, t_R: int64, from and to where.
    """

    predict: Predict
    process: Process
    x_s_RChw: torch.Tensor
    s_R: torch.Tensor
    t_R: torch.Tensor

    def all_rows(self) -> torch.Tensor:
        """0 .. R - 1."""
        return torch.arange(len(self.x_s_RChw), device=self.x_s_RChw.device)

    def carried(self, eps_NChw: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        """F(x_s, eps) of the given rows."""
        return carry(self.process, self.x_s_RChw[rows_N], eps_NChw, self.s_R[rows_N], self.t_R[rows_N])

    def image(self, x_NChw: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        """F(x_s, eps(x, t)) of the given rows, t as the step asks at: one evaluation of the model for each."""
        return self.carried(self.predict(x_NChw, rows_N), rows_N)


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        x_RChw: the rows' x_t.
        residual_R: ||x_t - F(x_s, eps(x_t, t))|| / ||x_t||, t as the step asks at, where the solver knows it without a
            further evaluation; None where it does not.
    """

    x_RChw: torch.Tensor
    residual_R: torch.Tensor | None
