"""The sampler's stochastic step, against diffusers' schedulers and plain float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from smpo_common.errors import UserError
from smpo_models.noise_schedules.base import START, NoiseSchedule
from smpo_models.noise_schedules.rectified_flow import RectifiedFlow
from smpo_models.noise_schedules.transition import StochasticSteps
from smpo_models.noise_schedules.variance_preserving import VariancePreserving

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
STEPS = 20


def ddim(**changes: object) -> DDIMScheduler:
    return DDIMScheduler(**LEVELS, clip_sample=False, set_alpha_to_one=False, **changes)


def steps_of(schedule: NoiseSchedule, eta: float = 1.0) -> StochasticSteps:
    return StochasticSteps(schedule.grid(STEPS, 256), eta)


def drawn(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize(
    ("t", "c", "sigma", "weight"),
    # By hand from the products of 1 - beta of Stable Diffusion 1.5; sigma of the last two was not noted.
    [(801, -0.43285, 0.58073, 0.55556), (401, -0.23344, None, 0.39129), (101, -0.19093, None, 1.30246)],
)
def test_numbers_of_stable_diffusion(t: int, c: float, sigma: float | None, weight: float) -> None:
    schedule = VariancePreserving(ddim())
    t_B, like = torch.tensor([t]), torch.zeros(1, dtype=torch.float64)
    step = steps_of(schedule).transition(schedule, t_B, like)
    a_t, s_t = schedule.levels(t_B, like)
    found = -step.on_x0 * s_t / a_t
    assert steps_of(schedule).below(t_B).item() == t - 50
    assert found.item() == pytest.approx(c, abs=5e-6)
    assert ((found / step.std) ** 2).item() == pytest.approx(weight, abs=5e-6)
    if sigma is not None:
        assert step.std.item() == pytest.approx(sigma, abs=5e-6)


@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_ddims(prediction_type: str, eta: float) -> None:
    scheduler = ddim(prediction_type=prediction_type)
    scheduler.set_timesteps(STEPS)
    schedule = VariancePreserving(scheduler)
    x_t, output, noise = drawn(3, (1, 4, 2, 2))
    for t in (951, 401, 1):
        t_B = torch.tensor([t])
        step = steps_of(schedule, eta).transition(schedule, t_B, x_t)
        found = step.mean(x_t, schedule.x0_in(output, x_t, t_B)) + step.std * noise
        wanted = scheduler.step(output, t, x_t, eta=eta, variance_noise=noise).prev_sample
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_a_step_is_that_of_the_flow_scheduler() -> None:
    """Also from pure noise, where a_t is 0, and to the end, where no noise is left."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    schedule = RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0), sampler_steps=STEPS)
    x_t, output = drawn(2, (1, 4, 2, 2), torch.float32)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(7))
    for place in (0, 7, STEPS - 1):
        scheduler.set_timesteps(STEPS)
        t = scheduler.timesteps[place]
        step = steps_of(schedule).transition(schedule, t[None], x_t)
        found = step.mean(x_t, schedule.x0_in(output, x_t, t[None])) + step.std * noise
        wanted = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(7)).prev_sample
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    assert step.std.item() == 0


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_the_distance_from_the_mean_is_that_of_the_noises(kind: str) -> None:
    """|x_s - mu|^2 = c^2 |eps - eps_i|^2; and both draws of a step, as states of a pair, rebuild x_t."""
    schedule: NoiseSchedule = VariancePreserving(ddim())
    if kind == "flow":
        schedule = RectifiedFlow(FlowMatchEulerDiscreteScheduler(), sampler_steps=STEPS)
    steps = steps_of(schedule)
    t_B = torch.tensor(steps.grid[1:-1], dtype=schedule.timestep_dtype)
    x_t, output, *noises = drawn(4, (len(t_B), 4, 2, 2))
    a_t, s_t = schedule.levels(t_B, x_t)
    a_s, s_s = schedule.levels(steps.below(t_B), x_t)
    step = steps.transition(schedule, t_B, x_t)
    x0, eps = schedule.x0_in(output, x_t, t_B), schedule.noise_in(output, x_t, t_B)
    c = (s_s**2 - step.std**2).clamp_min(0).sqrt() - a_s * s_t / a_t
    mean = a_s / a_t * x_t + c * eps
    np.testing.assert_allclose(step.mean(x_t, x0), mean, rtol=0, atol=1e-12)
    for noise in noises:
        x_s = mean + step.std * noise
        eps_i = (x_s - a_s / a_t * x_t) / c
        x0_i = step.x0_of(x_s, x_t)
        distances = (x_s - mean).square().sum((1, 2, 3)), (c * (eps - eps_i)).square().sum((1, 2, 3))
        np.testing.assert_allclose(*distances, rtol=1e-12)
        np.testing.assert_allclose(x0_i, (x_t - s_t * eps_i) / a_t, rtol=0, atol=1e-11)
        np.testing.assert_allclose(schedule.noised(x0_i, (x_t - a_t * x0_i) / s_t, t_B), x_t, rtol=0, atol=1e-12)


def test_the_lowest_step_leads_to_the_start() -> None:
    schedule = VariancePreserving(ddim())
    assert steps_of(schedule).below(torch.tensor([1, 51, 951])).tolist() == [START, 1, 901]


def test_refused_etas() -> None:
    vp, flow = VariancePreserving(ddim()), RectifiedFlow(FlowMatchEulerDiscreteScheduler(), sampler_steps=STEPS)
    vp.check_eta(0.5, "it")
    flow.check_eta(1, "it")
    for eta in (0, 1.5):
        with pytest.raises(UserError, match=f"--eta {eta}: .* a number above 0, at most 1"):
            vp.check_eta(eta, "it")
    with pytest.raises(UserError, match="--eta 0.5: it is a flow model"):
        flow.check_eta(0.5, "it")
    flow.has_stochastic_steps = False
    with pytest.raises(UserError, match="its scheduler, DPM-Solver, has no stochastic"):
        flow.check_eta(1, "it")
