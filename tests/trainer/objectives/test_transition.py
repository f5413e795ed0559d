"""The margin of step pairs, against the likelihoods of the sampler's step and the linear formula, in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from smpo_common.errors import UserError
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_models.noise_schedules.rectified_flow import RectifiedFlow
from smpo_models.noise_schedules.transition import StochasticSteps
from smpo_schemas.manifest import StepSettings, write_manifest
from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.experiment import resolve_experiment
from smpo_trainer.objectives import find_objective
from smpo_trainer.objectives.base import PairBatch
from smpo_trainer.objectives.pair_loss import PairLoss
from smpo_trainer.objectives.timestep_weighting import TimestepWeighting
from tests.trainer.helpers import arguments, resolve_settings, with_manifest
from tests.trainer.objectives.test_timestep_weighting import schedule

BETA = 0.7
TYPES = ["epsilon", "v_prediction", "sample", "flow"]


class Pairs:
    """Draws of a step of a random model, and the margin that a loss gives to a changed one."""

    def __init__(self, prediction_type: str, options: dict[str, str] | None = None) -> None:
        self.schedule: NoiseSchedule = (
            RectifiedFlow(FlowMatchEulerDiscreteScheduler(), sampler_steps=20)
            if prediction_type == "flow"
            else schedule(prediction_type, steps_offset=1)
        )
        self.steps = StochasticSteps(self.schedule.grid(20, 256), 1.0)
        self.t_B = torch.tensor([self.steps.grid[place] for place in (3, 7, 15)], dtype=self.schedule.timestep_dtype)
        generator = torch.Generator().manual_seed(0)
        shape = (3, 2, 4, 4)
        x_t, ref, policy, *noises = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5))
        self.x_t, self.ref, self.policy = x_t, ref, ref + 0.1 * policy
        self.step = self.steps.transition(self.schedule, self.t_B, x_t)
        self.draws = [self.mean(ref) + self.step.std * noise for noise in noises]
        kind = find_objective("dpo")
        objective = kind(kind.Options.parse("dpo", options or {}, beta=BETA))
        self.loss = PairLoss(
            objective, self.schedule, TimestepWeighting("transition", 5.0, 0.0, None, self.steps), None, 1.0
        )
        self.a, self.s = self.schedule.levels(self.t_B, x_t)

    def mean(self, output: torch.Tensor) -> torch.Tensor:
        return self.step.mean(self.x_t, self.schedule.x0_in(output, self.x_t, self.t_B))

    def noise(self, x_s: torch.Tensor) -> torch.Tensor:
        """The noise of a draw, as a state of x_t."""
        return (self.x_t - self.a * self.step.x0_of(x_s, self.x_t)) / self.s

    def errors(self, output: torch.Tensor) -> torch.Tensor:
        errors = []
        for x_s in self.draws:
            target = self.schedule.target(self.step.x0_of(x_s, self.x_t), self.noise(x_s), self.t_B)
            errors.append((output - target).square().mean((1, 2, 3)))
        return torch.stack(errors, dim=1)

    def margin(self, output: torch.Tensor) -> torch.Tensor:
        weight_B = self.loss.timestep_weight(self.t_B, torch.zeros(3, dtype=torch.float64))[:, None]
        unknown = torch.full((3,), torch.nan, dtype=torch.float64)
        errors = weight_B * self.errors(output), weight_B * self.errors(self.ref)
        return self.loss.objective.margin(PairBatch(*errors, unknown, unknown, self.t_B))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_margin_is_that_of_the_likelihoods(prediction_type: str) -> None:
    pairs = Pairs(prediction_type)
    wanted = 0.0
    for sign, x_s in zip((1, -1), pairs.draws, strict=True):
        for side, output in ((1, pairs.policy), (-1, pairs.ref)):
            likelihood = Normal(pairs.mean(output), pairs.step.std).log_prob(x_s).mean((1, 2, 3))
            wanted = wanted + sign * side * BETA * likelihood
    np.testing.assert_allclose(pairs.margin(pairs.policy), wanted, rtol=1e-9)
    assert pairs.margin(pairs.ref).tolist() == [0, 0, 0]


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_margin_is_linear_in_the_model(prediction_type: str) -> None:
    """h = beta w mean((eps - eps_ref)(eps^0 - eps^1)), and its gradient; exchanged images change the sign."""
    pairs = Pairs(prediction_type)
    c = -pairs.step.on_x0 * pairs.s / pairs.a
    eps, ref = (pairs.schedule.noise_in(each, pairs.x_t, pairs.t_B) for each in (pairs.policy, pairs.ref))
    apart = pairs.noise(pairs.draws[0]) - pairs.noise(pairs.draws[1])
    np.testing.assert_allclose(apart, (pairs.draws[0] - pairs.draws[1]) / c, rtol=1e-9, atol=1e-12)
    weight = BETA * (c / pairs.step.std) ** 2
    np.testing.assert_allclose(pairs.margin(pairs.policy), (weight * (eps - ref) * apart).mean((1, 2, 3)), rtol=1e-9)
    output = pairs.policy.clone().requires_grad_()
    pairs.margin(output).sum().backward()
    per_output = {"epsilon": 1, "v_prediction": pairs.a, "sample": -pairs.a / pairs.s, "flow": pairs.a}
    wanted = weight * apart * per_output[prediction_type] / pairs.x_t[0].numel()
    np.testing.assert_allclose(output.grad, wanted, rtol=1e-8, atol=1e-12)
    margin = pairs.margin(pairs.policy)
    pairs.draws.reverse()
    np.testing.assert_allclose(pairs.margin(pairs.policy), -margin, rtol=1e-9)


def test_clipped_ratios() -> None:
    """D3PO's clamp of each image's ratio to 0.9 .. 1.1, by hand; within it nothing changes."""
    pairs = Pairs("epsilon", {"ratio_clip": "0.1"})
    weight_B = pairs.loss.timestep_weight(pairs.t_B, torch.zeros(3, dtype=torch.float64))[:, None]
    log_ratio = -weight_B / 2 * (pairs.errors(pairs.policy) - pairs.errors(pairs.ref))
    assert (log_ratio.abs() < 0.09).any()
    log_ratio[0] = torch.tensor([2.0, -2.0])
    unknown = torch.full((3,), torch.nan, dtype=torch.float64)
    ref = torch.zeros(3, 2, dtype=torch.float64)
    found = pairs.loss.objective.margin(PairBatch(-2 * log_ratio, ref, unknown, unknown, pairs.t_B))
    assert found[0].item() == pytest.approx(BETA * (math.log(1.1) - math.log(0.9)), rel=1e-12)
    clamped = log_ratio.exp().clamp(0.9, 1.1).log()
    np.testing.assert_allclose(found, BETA * (clamped[:, 0] - clamped[:, 1]), rtol=1e-12)


def with_steps(shards: Path, directory: Path, grid: list[float], **inversion: object) -> Path:
    with_manifest(shards, directory, source="steps", **inversion)
    manifest = ShardDirectory(directory).manifest
    made = StepSettings(grid=grid, trained=[2], candidates=2, continue_from="winner", gap=0.0)
    write_manifest(directory, manifest.model_copy(update={"steps": made}))
    return directory


def test_steps_are_read_from_the_manifest(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(*on: Path) -> TimestepWeighting:
        run = arguments(list(on), model, tmp_path / "run", objective="dpo", timestep_weighting="transition")
        return resolve_experiment(resolve_settings(monkeypatch, run), lambda _: None).weighting

    one = with_steps(shards, tmp_path / "one", [1, 51, 101], eta=0.5)
    assert resolve(one).steps == StochasticSteps((1, 51, 101), 0.5)
    other = with_steps(shards, tmp_path / "other", [1, 51, 101], eta=1.0)
    with pytest.raises(UserError, match="one and .*other differ in the steps of the sampler"):
        resolve(one, other)
    with pytest.raises(UserError, match="have states of source renoise; it is for step pairs"):
        resolve(shards)
