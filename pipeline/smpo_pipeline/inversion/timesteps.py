"""Plan which timesteps a trajectory visits, which of its states are stored, and at which timesteps those are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smpo_common.errors import UserError
from smpo_models.draws import trajectory_stream
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_schemas.inversion_settings import InversionSettings

_DRAWS = 64
"""Number of timesteps drawn at once; those that are too low are dropped."""


@dataclass(frozen=True)
class TrajectoryPlan:
    """The path of one trajectory.

    Attributes:
        nodes: timesteps visited, strictly increasing; whole numbers where the model knows no others.
        asked_at: for each node, the timestep at which the step to it evaluates the inverting denoiser: the node's own,
            except under ``published``.
        stored: indices into ``nodes`` of the states that are stored.
        used_at: the timestep that each stored state is used at: its node's own, except under ``published``.
        sampled_at: for ``--source truncated``: the timesteps of the sampler's steps to where x0 is estimated,
            decreasing; all nodes are above the last.
    """

    nodes: tuple[float, ...]
    asked_at: tuple[float, ...]
    stored: tuple[int, ...]
    used_at: tuple[float, ...]
    sampled_at: tuple[float, ...] = ()


def plan_trajectory(
    settings: InversionSettings,
    schedule: NoiseSchedule,
    seed: int,
    pair_id: str,
    trajectory: int,
    *,
    tokens: int,
    kept: Sequence[float] = (),
) -> TrajectoryPlan:
    """Draw the path of one trajectory, from (seed, pair_id, trajectory) and the number of image tokens alone.

    Args:
        settings: of the inversion.
        schedule: of the model.
        seed: with the pair's id, the source of all randomness.
        pair_id: of the pair.
        trajectory: number of the pair's trajectory.
        tokens: the image's number of tokens, on which some flow models' timesteps depend.
        kept: for ``--source sampled``: the timesteps of the pair's kept states, increasing.

    Raises:
        UserError: the model has too few timesteps for the settings, or none that inversion can reach.
    """
    if settings.source == "sampled":
        # Flow models' samplers start at T, but timesteps in shards are below T.
        below = float(np.nextafter(np.float32(schedule.num_train_timesteps), np.float32(0)))
        return _storing([min(t, below) for t in kept], settings, seed, pair_id, trajectory)
    if settings.source == "truncated":
        return _truncated(settings, schedule, trajectory_stream(seed, pair_id, trajectory, "truncated"), tokens)
    _check_steps(settings, schedule)
    last = schedule.first_pure_noise
    stream = trajectory_stream(seed, pair_id, trajectory, "timesteps")
    if settings.timesteps == "jittered":
        nodes: Sequence[float] = _jittered(stream, settings.steps, schedule, tokens)
    else:
        # No trajectory steps to pure noise. With v or x0 predicted, the noise in x at such a t is x itself, so that
        # every x is a fixed point: solvers would stop where they start, and say that they have converged.
        nodes = [t for t in schedule.grid(settings.steps, tokens) if t < last]
    if not nodes:
        raise UserError(
            f"--steps {settings.steps}: the scheduler's only timestep, {last}, is pure noise, which no image leads to; "
            "take more, or --timesteps jittered"
        )
    if settings.timesteps == "published":
        num_timesteps = schedule.num_train_timesteps
        return _published(nodes, num_timesteps // settings.steps, int(stream.integers(num_timesteps)))
    return _storing(nodes, settings, seed, pair_id, trajectory)


def _storing(
    nodes: Sequence[float], settings: InversionSettings, seed: int, pair_id: str, trajectory: int
) -> TrajectoryPlan:
    """Choose which nodes' states are stored."""
    stored = list(range(len(nodes)))
    if settings.states is not None and settings.states < len(nodes):
        choice = trajectory_stream(seed, pair_id, trajectory, "states").choice(
            len(nodes), settings.states, replace=False
        )
        stored = sorted(int(index) for index in choice)
    return TrajectoryPlan(tuple(nodes), tuple(nodes), tuple(stored), tuple(nodes[index] for index in stored))


def _truncated(
    settings: InversionSettings, schedule: NoiseSchedule, stream: np.random.Generator, tokens: int
) -> TrajectoryPlan:
    """Draw where the sampler begins on its grid, and timesteps above the one where it stops, as Self-NPO's code does.

    The latter are uniform in the sampler's clock, without repetition.

    Raises:
        UserError: the grid or the model has too few timesteps.
    """
    grid, steps, states = schedule.grid(settings.steps, tokens), settings.truncated_steps, settings.states or 1
    whole, last = not schedule.timestep_dtype.is_floating_point, schedule.first_pure_noise
    starts = [
        index
        for index in range(steps, len(grid))
        if grid[index - steps] < last and not (whole and last - 1 - grid[index - steps] < states)
    ]
    if settings.truncated_from == "noise":
        starts = [index for index in starts if index == len(grid) - 1]
    if not starts:
        raise UserError(
            f"--truncated-steps {steps}: of a sampler of --steps {settings.steps} there is no place to begin, with "
            f"{states} timesteps (--states) above the one that it is left at; take more --steps, or fewer --states"
        )
    start = starts[int(stream.integers(len(starts)))]
    sampled_at = tuple(grid[start - steps : start + 1][::-1])
    nodes: set[float] = set()
    while len(nodes) < states:
        times = stream.random(_DRAWS)
        timesteps = np.empty(_DRAWS, object)  # whole numbers stay whole
        timesteps[np.argsort(times)] = schedule.timesteps_at(np.sort(times), tokens)
        above = [t for t in timesteps if t > sampled_at[-1]]
        nodes.update(above[: states - len(nodes)])
    ordered = tuple(sorted(nodes))
    return TrajectoryPlan(ordered, ordered, tuple(range(states)), ordered, sampled_at)


def _check_steps(settings: InversionSettings, schedule: NoiseSchedule) -> None:
    """Check that the model has enough timesteps for ``--steps``.

    Raises:
        UserError: it has too few.
    """
    steps, last = settings.steps, schedule.first_pure_noise
    if steps >= last:
        raise UserError(f"--steps {steps}: the model has only {last} timesteps")
    if schedule.timestep_dtype.is_floating_point or settings.timesteps != "jittered":
        return
    # In a draw, about steps^3 / (6 (T - 1)^2) neighbouring strata get the same timestep: at this bound one draw in 4.5
    # has no such collision, at twice as many steps one in 10^5.
    most = int((9 * (last - 1) ** 2) ** (1 / 3))
    if steps > most and (last - 1) % steps:
        raise UserError(
            f"--steps {steps}: --timesteps jittered has room for {most} steps of {last} timesteps, "
            f"or for a number that divides {last - 1}; take fewer, or --timesteps grid"
        )


def _jittered(stream: np.random.Generator, steps: int, schedule: NoiseSchedule, tokens: int) -> Sequence[float]:
    """Draw one timestep in each of ``steps`` equal strata of the sampler's clock; over many draws, t is uniform in it.

    Two neighbouring strata may draw the same timestep where timesteps are whole numbers and ``steps`` does not divide
    T - 1: the trajectory is then drawn again. With 1000 timesteps this happens in no draw of 9 steps, 2 % of those of
    50, 15 % of 100, 74 % of 200. It makes some timesteps rarer than others, by up to 2.4 % at 50 steps, 4.5 % at 100,
    8 % at 200.
    """
    while True:
        times = (np.arange(steps) + stream.random(steps)) / steps
        nodes = schedule.timesteps_at(times, tokens)
        if len(set(nodes)) == steps:
            return nodes


def _published(grid: Sequence[float], step: int, t: int) -> TrajectoryPlan:
    """Plan as the published training code with the diffusers that it pins, 0.20.0: store the first state at or above t.

    The state is used at t. In that version, DDIMInverseScheduler's timesteps are where steps start: the grid, one
    ``step`` down. The code takes the steps that start below t and evaluates the model at their starts; the first is
    negative, and is embedded as it is.
    """
    num_nodes = 1 + sum(node < t for node in grid[:-1])
    asked_at = (grid[0] - step, *grid)[:num_nodes]
    return TrajectoryPlan(tuple(grid[:num_nodes]), asked_at, (num_nodes - 1,), (t,))
