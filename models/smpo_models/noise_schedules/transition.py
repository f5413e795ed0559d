"""The stochastic step of a first-order sampler: x_s ~ N(mu, sigma^2), from level t to the lower level s.

mu = (a_s / a_t) x_t + c noise with c = sqrt(s_s^2 - sigma^2) - a_s s_t / a_t (arXiv 2010.02502, eq. 12). Written
with the estimate of x0 in place of that of the noise, it also holds at pure noise (a_t = 0):

    mu = on_state x_t + on_x0 x0,   on_state = sqrt(s_s^2 - sigma^2) / s_t,   on_x0 = a_s - a_t on_state = -c a_t / s_t

Shape suffixes: B batch, N timesteps of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smpo_models.noise_schedules.base import START, NoiseSchedule


@dataclass(frozen=True)
class Transition:
    """The steps of B latents; all tensors are [B, 1, 1, 1].

    Attributes:
        on_state: factor of x_t in the mean.
        on_x0: factor of the estimate of x0; positive.
        std: sigma.
    """

    on_state: torch.Tensor
    on_x0: torch.Tensor
    std: torch.Tensor

    def mean(self, x_t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """Return mu, by the estimate of x0 at x_t."""
        return self.on_state * x_t + self.on_x0 * x0

    def x0_of(self, x_s: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Return the x0 for which the step's mean would be x_s; pairs of steps store it for the draw x_s."""
        return (x_s - self.on_state * x_t) / self.on_x0


@dataclass(frozen=True)
class StochasticSteps:
    """A sampler's stochastic steps: from each timestep of its grid to the next lower one, from the lowest to START.

    Attributes:
        grid: timesteps, increasing.
        eta: noise of a step, as a multiple of the schedule's ``step_std``.
    """

    grid: Sequence[float]
    eta: float

    def below(self, t_B: torch.Tensor) -> torch.Tensor:
        """Return the timestep s that the step from each timestep of the grid leads to, in the dtype of ``t_B``."""
        grid_N = torch.tensor(self.grid, dtype=torch.float64)
        lower_N = torch.tensor([START, *self.grid[:-1]], dtype=torch.float64)
        # The nearest: timesteps of flow models may be rounded to float32.
        places_B = (t_B.cpu().double()[:, None] - grid_N).abs().argmin(dim=1)
        return lower_N[places_B].to(t_B)

    def transition(self, schedule: NoiseSchedule, t_B: torch.Tensor, like: torch.Tensor) -> Transition:
        """Return the steps from timesteps of the grid, rounded once, from float64, to the dtype of ``like``."""
        exact, s_B = torch.empty(0, dtype=torch.float64), self.below(t_B)
        a_s, s_s = schedule.levels(s_B, exact)
        a_t, s_t = schedule.levels(t_B, exact)
        std = self.eta * schedule.step_std(s_B, t_B, exact)
        on_state = (s_s.square() - std.square()).clamp_min(0).sqrt() / s_t
        return Transition(*(value.to(like) for value in (on_state, a_s - a_t * on_state, std)))
