"""Which timesteps trajectories visit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from smpo_common.errors import UserError
from smpo_models.draws import trajectory_stream
from smpo_models.noise_schedules.variance_preserving import VariancePreserving
from smpo_pipeline.inversion import timesteps
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_schemas.inversion_settings import InversionSettings

SCHEDULE = VariancePreserving(DDIMScheduler())
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def nodes(trajectory: int, schedule: VariancePreserving = SCHEDULE, **settings) -> list[int]:
    return list(plan_trajectory(InversionSettings(**settings), schedule, 0, "pair", trajectory, tokens=64).nodes)


def zero_terminal_snr(**more) -> VariancePreserving:
    """a_999 = 0, exactly."""
    levels = {**_SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **more}
    return VariancePreserving(DDIMScheduler(**levels))


@pytest.mark.parametrize("steps", [1, 9, 50, 207, 333, 999])
def test_jittered_draws_one_timestep_a_stratum_and_none_twice(steps):
    for trajectory in range(20):
        drawn = np.array(nodes(trajectory, steps=steps))
        assert len(drawn) == steps
        assert (np.diff(drawn) > 0).all()
        # Stratum i holds what lies in [i, i + 1) * 999 / steps, rounded down, and then 1 more.
        edges = 1 + np.arange(steps + 1) * 999 / steps
        assert (np.floor(edges[:-1] + 1e-9) <= drawn).all()
        assert (drawn < edges[1:] - 1e-9).all()


def test_jittered_timesteps_are_uniform():
    """2000 trajectories of 9 steps, which divides 999: 18000 draws in 27 equal parts, chi squared at 1 in 10^6."""
    drawn = np.concatenate([nodes(trajectory) for trajectory in range(2000)])
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


def test_draws_of_an_ordinary_schedule_are_what_they_always_were():
    """Stored trajectories depend on them: strata of 1 .. 999, as they were before pure noise was left out."""
    schedule = VariancePreserving(DDIMScheduler(**_SD, set_alpha_to_one=False))
    for trajectory in range(50):
        stream = trajectory_stream(0, "pair", trajectory, "timesteps")
        assert nodes(trajectory, schedule) == [1 + int((i + u) / 9 * 999) for i, u in enumerate(stream.random(9))]
        t = int(trajectory_stream(0, "pair", trajectory, "timesteps").integers(1000))
        assert plan_trajectory(
            InversionSettings(timesteps="published"), schedule, 0, "pair", trajectory, tokens=64
        ).used_at == (t,)
    assert nodes(0, schedule, timesteps="grid") == list(range(1, 1000, 111))
    trailing = VariancePreserving(DDIMScheduler(**_SD, timestep_spacing="trailing"))
    assert nodes(0, trailing, timesteps="grid", steps=4) == [249, 499, 749, 999]


@pytest.mark.parametrize(
    ("t", "steps", "visited"),
    [
        (0, 5, (1,)),
        (1, 5, (1,)),
        (2, 5, (1, 201)),
        (201, 5, (1, 201)),
        (202, 5, (1, 201, 401)),
        (500, 5, (1, 201, 401, 601)),
        (801, 5, (1, 201, 401, 601, 801)),
        (950, 5, (1, 201, 401, 601, 801)),
        (1, 10, (1,)),
        (102, 10, (1, 101, 201)),
        (999, 10, (1, 101, 201, 301, 401, 501, 601, 701, 801, 901)),
    ],
)
def test_published_goes_to_the_first_node_at_or_above_t_asking_where_steps_start(monkeypatch, t, steps, visited):
    schedule = VariancePreserving(DDIMScheduler(**_SD, set_alpha_to_one=False))
    stream = SimpleNamespace(integers=lambda stop: t if stop == 1000 else None)
    monkeypatch.setattr(timesteps, "trajectory_stream", lambda *_: stream)
    plan = plan_trajectory(InversionSettings(timesteps="published", steps=steps), schedule, 0, "pair", 0, tokens=64)
    assert (plan.nodes, plan.used_at) == (visited, (t,))
    starts = {5: (-199, 1, 201, 401, 601), 10: (-99, 1, 101, 201, 301, 401, 501, 601, 701, 801)}[steps]
    assert plan.asked_at == starts[: len(visited)]
    assert plan.stored == (len(visited) - 1,)


def test_no_trajectory_steps_to_pure_noise():
    drawn = [nodes(trajectory, zero_terminal_snr(), steps=200) for trajectory in range(50)]
    assert {len(each) for each in drawn} == {200}
    assert max(t for each in drawn for t in each) == 998
    for spacing, kept in (("trailing", [249, 499, 749]), ("linspace", [0, 333, 666]), ("leading", [1, 251, 501, 751])):
        schedule = zero_terminal_snr(timestep_spacing=spacing)
        assert nodes(0, schedule, timesteps="grid", steps=4) == kept
    for trajectory in range(50):
        assert 999 not in nodes(trajectory, zero_terminal_snr(timestep_spacing="trailing"), timesteps="published")


def test_a_trajectory_to_pure_noise_alone_is_refused():
    with pytest.raises(UserError, match="--steps 1: the scheduler's only timestep, 999, is pure noise"):
        nodes(0, zero_terminal_snr(timestep_spacing="trailing"), timesteps="grid", steps=1)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_at_pure_noise_every_state_is_a_fixed_point(prediction_type):
    """Why no trajectory steps there."""
    schedule = zero_terminal_snr(prediction_type=prediction_type)
    x, output = torch.randn(2, 3, 4, 8, 8)
    s, t = torch.full((3,), 800), torch.full((3,), 999)
    torch.testing.assert_close(schedule.carry(torch.randn(3, 4, 8, 8), schedule.noise_in(output, x, t), s, t), x)
