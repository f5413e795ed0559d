"""Noise schedules against diffusers' schedulers and plain float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from smpo_common.errors import UserError
from smpo_models.noise_schedules.base import START
from smpo_models.noise_schedules.rectified_flow import RectifiedFlow, check_flow_scheduler
from smpo_models.noise_schedules.variance_preserving import VariancePreserving

STATIC = {"shift": 3.0}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
LINEAR = DYNAMIC | {"time_shift_type": "linear", "base_shift": 0.6, "max_shift": 2.0}
TERMINAL = DYNAMIC | {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
ROUNDING = {"rel": 2e-6, "abs": 2e-4}
"""Float32's, of numbers up to 1 that are subtracted from 1 and multiplied by 1000."""

CONFIGS = {"plain": {}, "static": STATIC, "dynamic": DYNAMIC, "linear": LINEAR, "terminal": TERMINAL}


def one_over(steps: int) -> np.ndarray:
    """The times that FluxPipeline hands to its scheduler."""
    return np.linspace(1.0, 1 / steps, steps)


def flow(config: dict, *, own: bool = False, sampler_steps: int = 28) -> RectifiedFlow:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    return RectifiedFlow(scheduler, sampler_steps=sampler_steps, sigmas=None if own else one_over)


def shifted(u: float, config: dict, tokens: int) -> float:
    """Sigma at the sampler's time u, before any stretch, by the formulas of the papers."""
    if not config.get("use_dynamic_shifting"):
        shift = config.get("shift", 1.0)
        return shift * u / (1 + (shift - 1) * u)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - 256) / (config.get("max_image_seq_len", 4096) - 256)
    strength = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return strength / (strength + 1 / u - 1)


def expected(times: list[float], config: dict, tokens: int, last: float) -> list[float]:
    """T sigma at the given times; the stretch leads the last of the sampler's times to shift_terminal."""
    sigmas = [shifted(u, config, tokens) for u in times]
    if terminal := config.get("shift_terminal"):
        stretch = (1 - terminal) / (1 - shifted(last, config, tokens))
        sigmas = [1 - (1 - sigma) * stretch for sigma in sigmas]
    return [1000 * sigma for sigma in sigmas]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("own", [True, False], ids=["own-sigmas", "one-over-steps"])
@pytest.mark.parametrize(("steps", "tokens"), [(2, 256), (4, 4096), (28, 1024), (50, 9216)])
def test_the_grid_is_the_schedulers(name, own, steps, tokens):
    """To the bit; and to float32's rounding that of the formula."""
    config = CONFIGS[name]
    grid = flow(config, own=own).grid(steps, tokens)
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    limits = ("max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, 256, *(scheduler.config[name] for name in limits))
    scheduler.set_timesteps(*([steps] if own else []), mu=mu, **({} if own else {"sigmas": one_over(steps)}))
    assert grid == scheduler.timesteps.tolist()[::-1]
    static = "use_dynamic_shifting" not in config
    lowest = (shifted(1 / 1000, config, tokens) if static else 1 / 1000) if own else 1 / steps
    times = [1 + (lowest - 1) * i / (steps - 1) for i in range(steps)]
    assert grid == pytest.approx(expected(times, config, tokens, times[-1])[::-1], **ROUNDING)
    assert grid[-1] == 1000
    if name == "terminal":
        assert grid[0] == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [256, 4096])
def test_times_become_timesteps_by_the_samplers_shift(name, tokens):
    config = CONFIGS[name]
    times = np.array([0.0, 0.1, 0.5, 0.9, 1 - 1e-9])
    lowest = 1 / 28 if name == "terminal" else 1 / 1000
    wanted = expected([lowest + u * (1 - lowest) for u in times], config, tokens, 1 / 28)
    found = flow(config).timesteps_at(times, tokens)
    assert found[:-1] == pytest.approx(wanted[:-1], **ROUNDING)
    # Never pure noise, in float32 either.
    assert 999.99 < found[-1] < 1000
    assert float(np.float32(found[-1])) < 1000


def test_timesteps_depend_on_tokens_and_with_a_stretch_on_the_samplers_steps():
    times = np.linspace(0, 0.95, 20)
    assert flow(STATIC).timesteps_at(times, 256) == flow(STATIC, sampler_steps=50).timesteps_at(times, 4096)
    few, many = (flow(DYNAMIC).timesteps_at(times, tokens) for tokens in (256, 4096))
    assert all(a < b for a, b in zip(few, many, strict=True))
    assert few == flow(DYNAMIC, sampler_steps=50).timesteps_at(times, 256)
    stretched = [flow(TERMINAL, sampler_steps=steps).timesteps_at(times, 256) for steps in (10, 50)]
    assert stretched[0][0] == stretched[1][0] == pytest.approx(20, rel=1e-4)
    assert all(a != b for a, b in zip(*(each[1:] for each in stretched), strict=True))


def test_a_stretch_to_one_step_is_refused():
    with pytest.raises(UserError, match="--steps 1: the model's scheduler stretches its grid"):
        flow(TERMINAL).grid(1, 256)
    assert flow(DYNAMIC).grid(1, 256) == [1000]


def test_rectified_flow_by_hand():
    schedule = flow(STATIC)
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t_B = torch.tensor([0.5, 250.25, 999.9])
    s = t_B.double().reshape(-1, 1, 1, 1) / 1000
    x_t = schedule.noised(x0, noise, t_B)
    torch.testing.assert_close(x_t, (1 - s) * x0 + s * noise, rtol=1e-12, atol=1e-12)
    velocity = schedule.target(x0, noise, t_B)
    assert torch.equal(velocity, noise - x0)
    torch.testing.assert_close(schedule.noise_in(velocity, x_t, t_B), noise)
    torch.testing.assert_close(schedule.x0_in(velocity, x_t, t_B), x0)
    a, s = schedule.levels(torch.tensor([float(START), 0.0]), x0)
    assert (a.flatten().tolist(), s.flatten().tolist()) == ([1, 1], [0, 0])
    assert (schedule.prediction_type, schedule.first_pure_noise) == ("flow", 1000)


def test_a_step_is_eulers_whose_fixed_points_ddims_has_too():
    """DDIM's step with the noise x + a_t v; as an iteration from x_s it goes a_t / a_s of the way."""
    schedule = flow(STATIC)
    x, velocity = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    s_B, t_B = torch.tensor([0.0, 400.0]), torch.tensor([300.0, 990.0])
    there = schedule.carry(x, velocity, s_B, t_B)
    distance = (t_B - s_B).double().reshape(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(there, x + distance * velocity)
    torch.testing.assert_close(schedule.carry(there, velocity, t_B, s_B), x)
    (a_s, s_s), (a_t, s_t) = (schedule.levels(each, x) for each in (s_B, t_B))

    def ddim(eps: torch.Tensor) -> torch.Tensor:
        return a_t * (x - s_s * eps) / a_s + s_t * eps

    torch.testing.assert_close(ddim(schedule.noise_in(velocity, there, t_B)), there)
    torch.testing.assert_close(ddim(schedule.noise_in(velocity, x, t_B)), x + a_t / a_s * (there - x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_levels_are_those_of_the_schedulers_own_noising(config):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=one_over(8), mu=1.0)
    x0, noise = torch.randn(2, 8, 4, 2, 2)
    wanted = scheduler.scale_noise(x0, scheduler.timesteps, noise)
    torch.testing.assert_close(flow(config).noised(x0, noise, scheduler.timesteps), wanted)


def test_fingerprints_tell_schedules_apart():
    prints = {name: flow(config).fingerprint() for name, config in CONFIGS.items()}
    prints["variance preserving"] = VariancePreserving(DDIMScheduler()).fingerprint()
    assert len(set(prints.values())) == len(CONFIGS) + 1
    # What only says how often the sampler steps changes no level.
    assert flow(STATIC, sampler_steps=4).fingerprint() == prints["static"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_x0_is_found_in_the_output(prediction_type):
    schedule = VariancePreserving(DDIMScheduler(prediction_type=prediction_type))
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t_B = torch.tensor([0, 500, 999])
    x_t = schedule.noised(x0, noise, t_B)
    torch.testing.assert_close(schedule.x0_in(schedule.target(x0, noise, t_B), x_t, t_B), x0)


@pytest.mark.parametrize(
    "setting",
    ["invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"],
)
def test_schedulers_with_another_grid_are_refused(setting):
    config = dict(FlowMatchEulerDiscreteScheduler().config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    check_flow_scheduler(config, "--model m")
    with pytest.raises(UserError, match=f"--model m: its scheduler's config sets {setting}"):
        check_flow_scheduler(config | {setting: True}, "--model m")
    with pytest.raises(UserError, match="--model m: its scheduler is DDIMScheduler; of flow models only"):
        check_flow_scheduler(dict(DDIMScheduler().config) | {"_class_name": "DDIMScheduler"}, "--model m")
