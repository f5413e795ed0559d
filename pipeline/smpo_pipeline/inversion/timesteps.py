"""Which timesteps a walk visits, and which of its states are stored as what (DESIGN 4.2, "Which t")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smpo_models.process import Process
from smpo_pipeline.inversion.draws import generator
from smpo_schemas.errors import UserError
from smpo_schemas.manifest import InversionSettings


@dataclass(frozen=True)
class WalkPlan:
    """The path of one walk.

    Attributes:
        nodes: timesteps visited, strictly increasing.
        stored: indices into ``nodes`` of the states that are stored; -1 is the start, before any step.
        used_at: the timestep that each stored state is used at; its own node's except under ``published``.
    """

    nodes: tuple[int, ...]
    stored: tuple[int, ...]
    used_at: tuple[int, ...]


def plan_walk(settings: InversionSettings, process: Process, seed: int, pair_id: str, walk: int) -> WalkPlan:
    """Draw the path of one walk.

    Raises:
        UserError: more steps than the model has timesteps.
    """
    last = process.num_train_timesteps
    if settings.steps >= last:
        raise UserError(f"--steps {settings.steps}: the model has only {last} timesteps")
    stream = generator(seed, pair_id, walk, "timesteps")
    if settings.timesteps == "published":
        return _published(process.grid(settings.steps), int(stream.integers(last)))
    nodes = (
        _jittered(stream, settings.steps, last) if settings.timesteps == "jittered" else process.grid(settings.steps)
    )
    stored = list(range(len(nodes)))
    if settings.states is not None and settings.states < len(nodes):
        choice = generator(seed, pair_id, walk, "states").choice(len(nodes), settings.states, replace=False)
        stored = sorted(int(index) for index in choice)
    return WalkPlan(tuple(nodes), tuple(stored), tuple(nodes[index] for index in stored))


def _jittered(stream: np.random.Generator, steps: int, last: int) -> list[int]:
    """One integer in each of ``steps`` equal strata of 1 .. last - 1; over many draws, t is uniform.

    Where ``steps`` does not divide ``last - 1``, two neighbouring strata share an integer and may both draw it (for 50
    steps about once in a thousand walks): the walk is then drawn again, which moves no probability by more than that.
    """
    while True:
        uniform = (np.arange(steps) + stream.random(steps)) / steps
        nodes = [int(t) for t in 1 + np.floor(uniform * (last - 1))]
        if len(set(nodes)) == steps:
            return nodes


def _published(grid: list[int], t: int) -> WalkPlan:
    """The published training code: the state of the last node below a uniform t, used as if it were at t."""
    nodes = tuple(node for node in grid if node < t)
    return WalkPlan(nodes, (len(nodes) - 1,), (t,))
