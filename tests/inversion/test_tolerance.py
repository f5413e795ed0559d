"""Solvers with a tolerance, on a model whose steps have solutions; and what is rejected."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from smpo_models.loading import load_family
from smpo_pipeline.inversion import inverter as inverter_module
from smpo_pipeline.inversion.advice import health_warnings
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.toy.create import ASSETS
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import Oracle, embedded_pair, make_pair
from tests.inversion.worlds import SEED, check_state, invert
from tests.tiny.stable_diffusion import make_tiny_model

STEPS = 5


@pytest.fixture(scope="module")
def embedded():
    """The embedded world's model, and the float64 fixed points of a pair's trajectory by plain iteration."""
    folder = str(ASSETS / "model")
    family, oracle = load_family(folder), Oracle(folder, "epsilon")
    pair = embedded_pair()
    (sample,), _ = invert(family, InversionSettings(steps=STEPS, prompt_dropout=0, hflip=False), [pair])
    text, trajectories = oracle.embed(pair.prompt), []
    for image in range(2):
        x, s, trajectory = sample.x0_2Chw[image].double(), -1, []
        for t in sample.timestep_K.tolist():
            x_s = x
            for _ in range(60):
                before, x = x, oracle.carry(x_s, oracle.noise(x, t, text), s, t)
                if (x - before).norm() < 1e-8 * x.norm():
                    break
            assert (x - before).norm() < 1e-8 * x.norm()
            trajectory.append(x)
            s = t
        trajectories.append(trajectory)
    return family, oracle, pair, text, trajectories


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["adaptive", "anderson"])
def test_solvers_with_a_tolerance_store_the_exact_inversion(embedded, solver):
    family, oracle, pair, text, trajectories = embedded
    settings = InversionSettings(solver=solver, tolerance=1e-5, steps=STEPS, prompt_dropout=0, hflip=False)
    (sample,), health = invert(family, settings, [pair])
    assert float(sample.residual_K2.max()) <= 1e-5
    for image in range(2):
        for k, x_t in enumerate(trajectories[image]):
            check_state(oracle, sample, k, image, text, x_t)
    assert [band.unconverged for band in health.bands(1000)] == [0] * 5
    assert sum(band.solved for band in health.bands(1000)) == 2 * settings.steps


def test_states_that_did_not_converge_are_counted_and_their_residual_tells(embedded):
    family, _, pair, _, _ = embedded
    settings = InversionSettings(solver="adaptive", max_evaluations=3, prompt_dropout=0, hflip=False)
    (sample,), health = invert(family, settings, [dataclasses.replace(pair, measured=False)])
    unconverged = int((sample.residual_K2 > settings.tolerance).sum())
    assert unconverged > 5
    assert sum(band.unconverged for band in health.bands(1000)) == unconverged
    assert any("did not reach --tolerance" in line for line in health_warnings(health.bands(1000), settings))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["adaptive", "anderson"])
def test_solvers_with_a_tolerance_do_not_depend_on_neighbours_or_order(embedded, solver):
    family, _, pair, _, _ = embedded
    settings = InversionSettings(solver=solver, steps=3)
    pairs = [dataclasses.replace(pair, pair_id=f"{number}") for number in range(3)]
    one, _ = invert(family, settings, pairs, batch_size=1)
    other, _ = invert(family, settings, pairs[::-1], batch_size=3)
    for sample, twin in zip(one, other[::-1], strict=True):
        assert twin.meta == sample.meta
        for name in ("noise", "ref_error"):
            torch.testing.assert_close(
                twin.tensors()[name].double(), sample.tensors()[name].double(), rtol=2e-3, atol=1e-3
            )


@pytest.mark.slow
def test_the_residual_costs_no_evaluation_where_the_solver_has_it(epsilon_world, monkeypatch):
    """With guidance the forward that measures ref_error cannot serve, but the solver's own can."""
    family, _ = epsilon_world
    settings = InversionSettings(solver="anderson", guidance_scale=1.5, steps=3, prompt_dropout=0, tolerance=1e-3)
    inverter = Inverter(family, family.denoiser, settings, SEED)
    monkeypatch.setattr(inverter_module, "distance", None)
    (sample,), health = inverter.invert([(make_pair(1), 0)])
    assert sample.residual_K2.isfinite().all()
    unconverged = int((sample.residual_K2 > settings.tolerance).sum())
    assert sum(band.unconverged for band in health.bands(1000)) == unconverged


def test_latents_that_overflow_are_rejected_with_a_reason(epsilon_world, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "epsilon", seed=3)
    family = load_family(str(folder))
    with torch.no_grad():
        family.vae.quant_conv.bias.fill_(torch.nan)
    (sample,), health = Inverter(family, family.denoiser, InversionSettings(), 0).invert([(make_pair(0), 0)])
    assert sample.reason.startswith("not finite")
    assert all(value == 0 for band in health.to_lists() for value in band)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["renoise", "adaptive", "anderson"])
def test_a_pair_that_is_no_number_is_rejected_and_changes_no_other(solver, tmp_path, monkeypatch):
    family = load_family(str(make_tiny_model(tmp_path / "model", "epsilon", seed=3)))
    settings = InversionSettings(solver=solver, steps=3, tolerance=1e-4)
    posterior = family.posterior
    (expected,), _ = invert_all(family, settings, [make_pair(1)])

    def broken(pixels):
        mean, std = posterior(pixels)
        mean[:2] = torch.nan  # both images of the first pair
        return mean, std

    monkeypatch.setattr(family, "posterior", broken)
    (rejected, kept), health = invert_all(family, settings, [make_pair(0), make_pair(1)])
    assert rejected.reason.startswith("not finite")
    torch.testing.assert_close(kept.noise_K2Chw, expected.noise_K2Chw, rtol=2e-3, atol=1e-3)
    assert sum(band.states for band in health.bands(1000)) == 2 * 3
    assert sum(band.solved for band in health.bands(1000)) == (0 if solver == "renoise" else 2 * 3)


@pytest.mark.parametrize("solver", ["renoise", "adaptive", "anderson"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_inverting_denoiser_that_gives_no_numbers_gives_rejected_pairs(embedded, solver, value):
    """Not the unmoved latents, which would have a finite tau and reference error."""
    family, *_ = embedded
    inverting_denoiser = copy.deepcopy(family.denoiser)
    with torch.no_grad():
        inverting_denoiser.conv_out.bias.fill_(value)
    inverter = Inverter(family, inverting_denoiser, InversionSettings(solver=solver, steps=3), SEED)
    (sample,), health = inverter.invert([(embedded_pair(), 0)])
    assert sample.reason.startswith("not finite")
    assert all(value == 0 for band in health.to_lists() for value in band)


def invert_all(family, settings: InversionSettings, pairs):
    return Inverter(family, family.denoiser, settings, SEED).invert([(pair, 0) for pair in pairs])
