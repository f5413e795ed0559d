"""Plan the steps of a sampler that give pairs, and check them against the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_models.noise_schedules.transition import StochasticSteps

_EVERY = 4
"""By default every fourth step is trained, from the noisiest: 20, 16, 12, 8, 4 of 20, as in TailorPO."""


def plan_steps(
    family: Family, model: str, side: int, *, steps: int, eta: float, trained: Sequence[int] | None
) -> tuple[StochasticSteps, list[int]]:
    """Return the sampler's steps, and the numbers of those to train, decreasing.

    Args:
        family: of the model; its weights need not be loaded.
        model: its name in errors.
        side: of the images in pixels.
        steps: of the sampler.
        eta: noise of a step, see :meth:`smpo_models.noise_schedules.base.NoiseSchedule.check_eta`.
        trained: numbers of steps, from 1, the last one of sampling; None: every fourth.

    Raises:
        UserError: the model has no such steps, or a trained one adds no noise.
    """
    family.check_resolution(side, model)
    schedule = family.noise_schedule
    schedule.check_eta(eta, model)
    # Flow models' samplers start at T, but timesteps in shards are below T.
    below = float(np.nextafter(np.float32(schedule.num_train_timesteps), np.float32(0)))
    grid = [min(t, below) for t in schedule.grid(steps, family.num_tokens(side, side))]
    chosen = sorted(set(trained or range(steps, 1, -_EVERY)), reverse=True)
    if not chosen or not 1 <= chosen[-1] <= chosen[0] <= steps:
        given = ",".join(map(str, trained or ()))
        raise UserError(f"--trained {given}: --steps {steps} has the steps 1 (the last of sampling) to {steps}")
    sampler = StochasticSteps(tuple(grid), eta)
    last = torch.tensor([grid[chosen[-1] - 1]], dtype=schedule.timestep_dtype)
    if not sampler.transition(schedule, last, torch.empty(0)).std.item():
        raise UserError(f"--trained {chosen[-1]}: this step of {model} ends without noise; leave it out")
    return sampler, chosen
