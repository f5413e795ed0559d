"""Which timesteps a trajectory visits, and which of its states are stored as what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from smpo_common.errors import UserError
from smpo_models.draws import trajectory_stream
from smpo_models.noise_schedule import Process
from smpo_schemas.inversion_settings import InversionSettings


@dataclass(frozen=True)
class TrajectoryPlan:
    """The path of one trajectory.

    Attributes:
        nodes: timesteps visited, strictly increasing.
        asked_at: the timestep that the step to each node asks the inverting denoiser at; the node's but under
        ``published``.
        stored: indices into ``nodes`` of the states that are stored.
        used_at: the timestep that each stored state is used at; its own node's but under ``published``.
    """

    nodes: tuple[int, ...]
    asked_at: tuple[int, ...]
    stored: tuple[int, ...]
    used_at: tuple[int, ...]


def _check_steps(settings: InversionSettings, last: int) -> None:
    """Whether trajectories over ``last`` timesteps can have so many steps.

    Raises:
        UserError: they cannot.
    """
    steps = settings.steps
    if steps >= last:
        raise UserError(f"--steps {steps}: the model has only {last} timesteps")
    # About steps^3 / (6 (T - 1)^2) neighbours meet in a draw: at this bound one draw in 4.5 has none that do, at twice
    # as many steps one in 10^5.
    most = int((9 * (last - 1) ** 2) ** (1 / 3))
    if settings.timesteps == "jittered" and steps > most and (last - 1) % steps:
        raise UserError(
            f"--steps {steps}: --timesteps jittered has room for {most} steps of {last} timesteps, "
            f"or for a number that divides {last - 1}; take fewer, or --timesteps grid"
        )


def plan_trajectory(
    settings: InversionSettings, process: Process, seed: int, pair_id: str, trajectory: int
) -> TrajectoryPlan:
    """Draw the path of one trajectory.

    Raises:
        UserError: more steps than the model has room for, or none that leads anywhere.
    """
    last = _first_pure_noise(process)
    _check_steps(settings, last)
    stream = trajectory_stream(seed, pair_id, trajectory, "timesteps")
    if settings.timesteps == "jittered":
        nodes = _jittered(stream, settings.steps, last)
    else:
        nodes = [t for t in process.grid(settings.steps) if t < last]
    if not nodes:
        raise UserError(
            f"--steps {settings.steps}: the scheduler's only timestep, {last}, is pure noise, which no image leads to; "
            "take more, or --timesteps jittered"
        )
    if settings.timesteps == "published":
        num_timesteps = process.num_train_timesteps
        return _published(nodes, num_timesteps // settings.steps, int(stream.integers(num_timesteps)))
    stored = list(range(len(nodes)))
    if settings.states is not None and settings.states < len(nodes):
        choice = trajectory_stream(seed, pair_id, trajectory, "states").choice(
            len(nodes), settings.states, replace=False
        )
        stored = sorted(int(index) for index in choice)
    return TrajectoryPlan(tuple(nodes), tuple(nodes), tuple(stored), tuple(nodes[index] for index in stored))


def _first_pure_noise(process: Process) -> int:
    """The timestep from which on a_t is 0 (zero terminal SNR, arXiv 2305.08891); T where there is none.

    No trajectory steps there. With v or x0 predicted, the noise in x at such a t is x itself, so that every x is a
    fixed
    point: solvers would stop where they start, and say that they have converged.
    """
    a, _ = process.levels(torch.arange(process.num_train_timesteps), torch.zeros(()))
    return int(a.count_nonzero())


def _jittered(stream: np.random.Generator, steps: int, last: int) -> list[int]:
    """One integer in each of ``steps`` equal strata of 1 .. last - 1; over many draws, t is uniform.

    Where ``steps`` does not divide ``last - 1``, two neighbouring strata share an integer and may both draw it: the
    trajectory is then drawn again. Of 1000 timesteps that is so for no draw of 9 steps, 2 % of those of 50, 15 % of
    100, 74 % of 200; and single timesteps become rarer than others, by up to 2.4 % at 50 steps, 4.5 % at 100, 8 % at
    200.
    """
    while True:
        uniform = (np.arange(steps) + stream.random(steps)) / steps
        nodes = [int(t) for t in 1 + np.floor(uniform * (last - 1))]
        if len(set(nodes)) == steps:
            return nodes


def _published(grid: list[int], step: int, t: int) -> TrajectoryPlan:
    """The published training code, on the diffusers that it pins, 0.20.0: the first state at or above t, used at t.

    That DDIMInverseScheduler's timesteps are where steps start: the grid, one ``step`` down. The code takes the steps
    that start below t and asks the model at their starts; the first is negative, and is embedded as it is.
    """
    num_nodes = 1 + sum(node < t for node in grid[:-1])
    asked_at = (grid[0] - step, *grid)[:num_nodes]
    return TrajectoryPlan(tuple(grid[:num_nodes]), asked_at, (num_nodes - 1,), (t,))
