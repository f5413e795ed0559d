from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from smpo_models.noise_schedules.rectified_flow import RectifiedFlow
from smpo_models.noise_schedules.variance_preserving import VariancePreserving
from smpo_trainer.objectives.timestep_weighting import TimestepWeighting

TIMESTEPS = torch.tensor([1, 50, 200, 500, 800, 999])


def schedule(prediction_type: str, **changes: object) -> VariancePreserving:
    return VariancePreserving(
        DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type=prediction_type,
            **changes,
        )
    )


def weights(kind: str, prediction_type: str, bias: float = 0.0, **changes: object) -> torch.Tensor:
    like = torch.zeros(len(TIMESTEPS), dtype=torch.float64)
    return TimestepWeighting(kind, 5.0, bias)(schedule(prediction_type, **changes), TIMESTEPS, like)


def snr() -> torch.Tensor:
    return compute_snr(schedule("epsilon").scheduler, TIMESTEPS).double()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_uniform_is_one(prediction_type: str) -> None:
    assert weights("uniform", prediction_type).tolist() == [1] * len(TIMESTEPS)


@pytest.mark.parametrize(
    ("prediction_type", "divisor"),
    # As in the paper and diffusers' examples: min(SNR, 5) over SNR, over SNR + 1, and on the error of x0.
    [("epsilon", lambda s: s), ("v_prediction", lambda s: s + 1), ("sample", torch.ones_like)],
)
def test_min_snr(prediction_type: str, divisor) -> None:
    wanted = snr().clamp(max=5) / divisor(snr())
    np.testing.assert_allclose(weights("min-snr", prediction_type), wanted, rtol=1e-5)


@pytest.mark.parametrize("bias", [0.0, -2.0, 1.5])
def test_sigmoid(bias: float) -> None:
    wanted = [1 / (1 + math.exp(math.log(s) - bias)) for s in snr().tolist()]
    np.testing.assert_allclose(weights("sigmoid", "epsilon", bias), wanted, rtol=1e-5)
    assert wanted == sorted(wanted)


@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_x0_weighs_errors_as_those_of_x0(prediction_type: str, cap: float | None) -> None:
    """At a given x_t, weight times error is the squared error of x0, or that of the noise times the cap."""
    flow = RectifiedFlow(FlowMatchEulerDiscreteScheduler(), sampler_steps=28)
    at = flow if prediction_type == "flow" else schedule(prediction_type)
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    a, s = at.levels(TIMESTEPS, x0)
    error = (output - at.target(x0, noise, TIMESTEPS)).square().mean(dim=(1, 2, 3))
    weighted = TimestepWeighting("x0", 5.0, 0.0, cap)(at, TIMESTEPS, error.detach()) * error
    found = at.x0_in(output, a * x0 + s * noise, TIMESTEPS)
    wanted = (found - x0).square().mean(dim=(1, 2, 3)) * ((a / s) ** 2 * (cap or math.inf)).clamp(max=1).flatten()
    torch.testing.assert_close(weighted, wanted, rtol=1e-8, atol=0)


def test_x0_by_hand() -> None:
    """(1 - a^2) / a^2 at the last timestep of SD 1.5, where a^2 is 0.0046600."""
    assert weights("x0", "epsilon")[-1].item() == pytest.approx(213.59, rel=1e-4)
    assert TimestepWeighting("x0", 5.0, 0.0, 7.0).identity() == {"timestep_weighting": "x0", "x0_cap": 7.0}


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_x0_is_finite_at_zero_terminal_snr(prediction_type: str) -> None:
    like = torch.zeros(len(TIMESTEPS), dtype=torch.float64)
    at = schedule(prediction_type, rescale_betas_zero_snr=True)
    assert TimestepWeighting("x0", 5.0, 0.0)(at, TIMESTEPS, like)[-1].item() == pytest.approx(1, abs=1e-6)
    assert TimestepWeighting("x0", 5.0, 0.0, 9.0)(at, TIMESTEPS, like)[-1].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["min-snr", "sigmoid"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_prediction_type_changes_nothing(kind: str, prediction_type: str) -> None:
    """The same wrong prediction has the same weighted error in every prediction space."""
    at = schedule(prediction_type)
    generator = torch.Generator().manual_seed(0)
    x0, noise, mistake = (torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    a, s = at.levels(TIMESTEPS, x0)
    guess_noise = noise + mistake
    guess_x0 = (a * x0 + s * noise - s * guess_noise) / a
    output = guess_x0 if prediction_type == "sample" else a * guess_noise - s * guess_x0
    error = (output - at.target(x0, noise, TIMESTEPS)).square().mean(dim=(1, 2, 3))
    on_noise = mistake.square().mean(dim=(1, 2, 3))
    weighted = weights(kind, prediction_type) * error
    np.testing.assert_allclose(weighted, weights(kind, "epsilon") * on_noise, rtol=1e-8)


@pytest.mark.parametrize("kind", ["min-snr", "sigmoid"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_is_finite(kind: str, prediction_type: str) -> None:
    last = weights(kind, prediction_type, rescale_betas_zero_snr=True)[-1]
    assert last == (1 if prediction_type == "epsilon" else pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("kind", ["min-snr", "sigmoid"])
def test_flow_models_too(kind: str) -> None:
    """The weighted error of a mistake about the velocity is that of the same mistake about the noise."""
    flow = RectifiedFlow(FlowMatchEulerDiscreteScheduler(), sampler_steps=28)
    t_B = torch.tensor([1.5, 250.0, 999.5])
    generator = torch.Generator().manual_seed(0)
    x_t, velocity, mistake = (torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    found, wanted = (flow.noise_in(each, x_t, t_B) for each in (velocity + mistake, velocity))
    on_noise = (found - wanted).square().mean(dim=(1, 2, 3))
    snr = ((1000 - t_B.double()) / t_B.double()).square()
    wanted_weight = snr.reciprocal().mul(5).clamp(max=1) if kind == "min-snr" else 1 / (1 + snr)
    weighted = TimestepWeighting(kind, 5.0, 0.0)(flow, t_B, on_noise) * mistake.square().mean(dim=(1, 2, 3))
    np.testing.assert_allclose(weighted, wanted_weight * on_noise, rtol=1e-8)
