"""Which timesteps walks visit."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDIMScheduler

from smpo_models.process import VariancePreserving
from smpo_pipeline.inversion.timesteps import plan_walk
from smpo_schemas.errors import UserError
from smpo_schemas.manifest import InversionSettings

PROCESS = VariancePreserving(DDIMScheduler())


def nodes(walk: int, **settings) -> list[int]:
    return list(plan_walk(InversionSettings(**settings), PROCESS, 0, "pair", walk).nodes)


@pytest.mark.parametrize("steps", [1, 9, 50, 207, 333, 999])
def test_jittered_draws_one_timestep_a_stratum_and_none_twice(steps):
    for walk in range(20):
        drawn = np.array(nodes(walk, steps=steps))
        assert len(drawn) == steps
        assert (np.diff(drawn) > 0).all()
        # Stratum i holds what lies in [i, i + 1) * 999 / steps, rounded down, and then 1 more.
        edges = 1 + np.arange(steps + 1) * 999 / steps
        assert (np.floor(edges[:-1] + 1e-9) <= drawn).all()
        assert (drawn < edges[1:] - 1e-9).all()


def test_jittered_timesteps_are_uniform():
    """Of 2000 walks of 9 steps, which divides 999: 18000 draws, in 27 equal parts, against chi squared at 1 in 10^6."""
    drawn = np.concatenate([nodes(walk) for walk in range(2000)])
    assert (drawn.min(), drawn.max()) == (1, 999)
    counts = np.bincount((drawn - 1) // 37, minlength=27)
    expected = len(drawn) / 27
    assert ((counts - expected) ** 2 / expected).sum() < 75.4


@pytest.mark.parametrize("steps", [208, 400, 998, 1000])
def test_more_steps_than_there_is_room_for_are_refused(steps):
    with pytest.raises(UserError, match=f"--steps {steps}: "):
        nodes(0, steps=steps)


def test_the_grid_takes_as_many_as_the_scheduler():
    assert len(nodes(0, steps=400, timesteps="grid")) == 400
