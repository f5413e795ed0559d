"""Every stored tensor, recomputed independently in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DDIMInverseScheduler

from smpo_models.draws import gaussian, trajectory_stream
from smpo_models.loading import load_family
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import Oracle, make_pair
from tests.inversion.worlds import SEED, all_nodes, check_state, expected_x0, invert, make_world
from tests.tiny.stable_diffusion import make_tiny_model

PAIRS = [make_pair(number) for number in (1, 2)]
"""The second one's prompt is empty."""


@pytest.fixture(
    scope="module",
    params=[*(("sd", p) for p in ("epsilon", "v_prediction", "sample")), ("sdxl", "epsilon"), ("pixart", "epsilon")],
    ids="-".join,
)
def world(request, tmp_path_factory):
    return make_world(tmp_path_factory, *request.param)


@pytest.mark.slow
def test_every_stored_tensor_equals_an_independent_float64_trajectory(world):
    """For every prediction type and every family."""
    check_trajectories(*world, InversionSettings(steps=4))


@pytest.mark.slow
def test_more_estimates_and_trajectories_too(some_world):
    check_trajectories(*some_world, InversionSettings(renoise_steps=3, steps=4, trajectories=2, prompt_dropout=0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        InversionSettings(),
        InversionSettings(renoise_steps=0, vae_latent="mode", timesteps="grid", steps=5),
        InversionSettings(states=3),
    ],
    ids=["defaults", "ddim-grid-mode", "some-states"],
)
def test_other_settings_too(epsilon_world, settings):
    """Of which no family has code of its own."""
    check_trajectories(*epsilon_world, settings)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(24, 40), (64, 16)], ids=str)
def test_other_shapes_too(some_world, shape):
    """As buckets have them; the model is told their own size as the target."""
    family, oracle = some_world
    oracle.target_size = shape
    check_trajectories(
        family, oracle, InversionSettings(steps=3), [make_pair(number, shape=shape) for number in range(2)]
    )
    oracle.target_size = (32, 32)


def check_trajectories(family, oracle: Oracle, settings: InversionSettings, pairs=PAIRS) -> None:
    samples, _ = invert(family, settings, pairs)
    assert len(samples) == len(pairs) * settings.trajectories
    for index, sample in enumerate(samples):
        pair = pairs[index // settings.trajectories]
        assert sample.meta.pair_id == pair.pair_id
        mode = settings.vae_latent == "mode"
        x0 = expected_x0(oracle, sample, pair, mode)
        torch.testing.assert_close(sample.x0_2Chw.float(), x0, rtol=2**-10, atol=1e-5)
        prompt = "" if sample.meta.prompt_dropped else pair.prompt
        nodes = all_nodes(family, settings, pair.pair_id, sample.meta.trajectory)
        for image in range(2):
            kept = 0
            start = sample.x0_2Chw[image].double()
            text = oracle.embed(prompt, pair.size[image], pair.crop[image])
            for t, x_s, s, x_t in oracle.trajectory(start, nodes, text, settings.renoise_steps):
                if t not in sample.timestep_K.tolist():
                    continue
                assert int(sample.timestep_K[kept]) == t
                check_state(oracle, sample, kept, image, text, x_t)
                eps = oracle.noise(x_t, t, text)
                residual = float((x_t - oracle.carry(x_s, eps, s, t)).norm() / x_t.norm())
                assert float(sample.residual_K2[kept, image]) == pytest.approx(residual, rel=0.02, abs=2e-5)
                kept += 1
            assert kept == (settings.states or settings.steps)


def test_what_is_stored_as_bfloat16_is_rounded_to_it_and_has_the_error_of_what_is_stored(some_world):
    """The same draws as in float16; it begins from the rounded x0, and ref_error is of the rounded state."""
    family, oracle = some_world
    settings = InversionSettings(storage="bfloat16", steps=4, prompt_dropout=0)
    pairs = [make_pair(number) for number in range(2)]
    samples, _ = invert(family, settings, pairs)
    for sample, pair in zip(samples, pairs, strict=True):
        assert {sample.x0_2Chw.dtype, sample.noise_K2Chw.dtype} == {torch.bfloat16}
        # Rounding to nearest moves a value by at most 2^-8 of itself; one in a hundred or so exactly to where it was.
        x0 = expected_x0(oracle, sample, pair, mode=False)
        torch.testing.assert_close(sample.x0_2Chw.float(), x0, rtol=2**-8, atol=1e-5)
        assert not torch.allclose(sample.x0_2Chw.float(), x0, rtol=2**-10, atol=1e-5)
        nodes = all_nodes(family, settings, pair.pair_id)
        for image in range(2):
            text = oracle.embed(pair.prompt, pair.size[image], pair.crop[image])
            steps = oracle.trajectory(sample.x0_2Chw[image].double(), nodes, text, settings.renoise_steps)
            for k, (_, _, _, x_t) in enumerate(steps):
                check_state(oracle, sample, k, image, text, x_t, rounding=2**-8)


def test_a_grid_trajectory_equals_diffusers_inverse_scheduler(epsilon_world):
    family, oracle = epsilon_world
    settings = InversionSettings(timesteps="grid", steps=5, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)])
    scheduler = DDIMInverseScheduler.from_config(family.noise_schedule.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(settings.steps)
    assert scheduler.timesteps.tolist() == sample.timestep_K.tolist()
    text = oracle.embed(sample.meta.prompt)
    for image in range(2):
        x = sample.x0_2Chw[image].double()
        for k, t in enumerate(sample.timestep_K.tolist()):
            e_0 = oracle.noise(x, t, text)
            y = scheduler.step(e_0, t, x).prev_sample
            x = scheduler.step((e_0 + oracle.noise(y, t, text)) / 2, t, x).prev_sample
            check_state(oracle, sample, k, image, text, x)


@pytest.mark.parametrize("start", ["level0", 300])
def test_other_starts(epsilon_world, start):
    family, oracle = epsilon_world
    settings = InversionSettings(start=start, steps=6, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)])
    text = oracle.embed(sample.meta.prompt)
    shared = gaussian(trajectory_stream(SEED, "pair-1", 0, "start"), (1, 4, 8, 8))[0].double()
    first = -1 if start == "level0" else start
    for image in range(2):
        x0 = sample.x0_2Chw[image].double()
        x, s = oracle.a(first) * x0 + oracle.s(first) * shared, first
        for k, t in enumerate(sample.timestep_K.tolist()):
            noised = start != "level0" and t <= start
            x_t = oracle.a(t) * x0 + oracle.s(t) * shared if noised else oracle.step(x, s, t, text, 1)
            check_state(oracle, sample, k, image, text, x_t)
            assert bool(sample.residual_K2[k, image].isnan()) == noised
            x, s = x_t, t


def test_inpo_adds_noise_of_the_ddim_posterior(epsilon_world):
    family, oracle = epsilon_world
    settings = InversionSettings(renoise_steps=0, eta=0.1, steps=4, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)])
    text = oracle.embed(sample.meta.prompt)
    stream = trajectory_stream(SEED, "pair-1", 0, "eta")
    drawn = [gaussian(stream, (2, 4, 8, 8)).double() for _ in range(4)]
    for image in range(2):
        x, s = sample.x0_2Chw[image].double(), -1
        for k, t in enumerate(sample.timestep_K.tolist()):
            alpha_s, alpha_t = oracle.a(s) ** 2, oracle.a(t) ** 2
            sigma = ((1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s)) ** 0.5
            x = oracle.step(x, s, t, text, 0) + 0.1 * sigma * drawn[k][image]
            check_state(oracle, sample, k, image, text, x)
            s = t


def test_guidance_moves_the_trajectory_but_not_what_the_reference_is_asked(epsilon_world):
    family, oracle = epsilon_world
    settings = InversionSettings(guidance_scale=3.0, steps=3, renoise_steps=0, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)])
    text, empty = oracle.embed(sample.meta.prompt), oracle.embed("")
    for image in range(2):
        x, s = sample.x0_2Chw[image].double(), -1
        for k, t in enumerate(sample.timestep_K.tolist()):
            unconditional = oracle.noise(x, t, empty)
            x = oracle.carry(x, unconditional + 3.0 * (oracle.noise(x, t, text) - unconditional), s, t)
            check_state(oracle, sample, k, image, text, x)
            s = t


def test_a_inverting_denoiser_carries_the_images_and_the_reference_is_what_is_measured(epsilon_world, tmp_path):
    family, oracle = epsilon_world
    folder = make_tiny_model(tmp_path / "inverting_denoiser", "epsilon", seed=9)
    inverting_denoiser, inverting = load_family(str(folder)).denoiser, Oracle(folder, "epsilon")
    settings = InversionSettings(steps=3, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)], inverting_denoiser=inverting_denoiser)
    text = oracle.embed(sample.meta.prompt)
    x0 = sample.x0_2Chw[0].double()
    for k, (t, x_s, s, x_t) in enumerate(inverting.trajectory(x0, sample.timestep_K.tolist(), text)):
        check_state(oracle, sample, k, 0, text, x_t)
        residual = (x_t - inverting.carry(x_s, inverting.noise(x_t, t, text), s, t)).norm() / x_t.norm()
        assert float(sample.residual_K2[k, 0]) == pytest.approx(float(residual), rel=0.02, abs=2e-5)


@pytest.mark.slow
def test_constant_size_conditioning_is_stored_as_what_the_denoiser_was_told(some_world):
    family, _ = some_world
    pair = dataclasses.replace(make_pair(1), size=((4000, 32), (1, 1)), crop=((900, 0), (0, 0)))
    (sample,), _ = invert(family, InversionSettings(size_conditioning="constant"), [pair])
    assert sample.meta.size == ((32, 32), (32, 32))
    assert sample.meta.crop == ((0, 0), (0, 0))
    (own,), _ = invert(family, InversionSettings(), [pair])
    assert (own.meta.size, own.meta.crop) == (pair.size, pair.crop)
    assert torch.equal(own.noise_K2Chw, sample.noise_K2Chw) == (family.kind != "sdxl")
