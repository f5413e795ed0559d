"""One step of inversion, x_s to x_t, with the noise schedule's step map F and direction d.

d is the noise for variance-preserving models (F is DDIM's step) and the velocity for flow models (F is Euler's step).
The exact x_t is a fixed point: x_t = F(x_s, d(x_t, t)). The model is evaluated at the step's end point t; only under
``--timesteps published`` is it evaluated at another one, where the step starts.

Shape suffixes: R rows of the step, N some of them, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from smpo_models.noise_schedules.base import NoiseSchedule

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The inverting denoiser's direction at x [N, C, h, w] of the rows int64 [N], at their steps' timesteps."""


def distance(x_NChw: torch.Tensor, image_NChw: torch.Tensor) -> torch.Tensor:
    """||x - image|| / ||x|| of each row: the residual, where ``image`` is F(x_s, d(x, t)): [N]."""
    return (x_NChw - image_NChw).flatten(1).norm(dim=1) / x_NChw.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Step:
    """R rows to bring from x_s at level s to level t.

    Attributes:
        predict: the inverting denoiser's direction.
        noise_schedule: noise levels.
        x_s_RChw: float32, the rows' states at level s.
        s_R, t_R: timesteps where the step starts and ends.
    """

    predict: Predict
    noise_schedule: NoiseSchedule
    x_s_RChw: torch.Tensor
    s_R: torch.Tensor
    t_R: torch.Tensor

    def all_rows(self) -> torch.Tensor:
        """Return the indices of all rows, 0 to R - 1."""
        return torch.arange(len(self.x_s_RChw), device=self.x_s_RChw.device)

    def carried(self, direction_NChw: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        """Return F(x_s, d) of the given rows."""
        return self.noise_schedule.carry(self.x_s_RChw[rows_N], direction_NChw, self.s_R[rows_N], self.t_R[rows_N])

    def image(self, x_NChw: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        """Return F(x_s, d(x, t)) of the given rows, t where the model is evaluated: one evaluation for each row."""
        return self.carried(self.predict(x_NChw, rows_N), rows_N)


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        x_RChw: the rows' x_t.
        residual_R: ||x_t - F(x_s, d(x_t, t))|| / ||x_t||, t where the model is evaluated; None if the solver does not
            know it without a further evaluation.
    """

    x_RChw: torch.Tensor
    residual_R: torch.Tensor | None
