"""States of images that the model made itself: the noise that they began from, and the sampler's own states."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smpo_models.draws import image_noise
from smpo_models.loading import load_family
from smpo_pipeline.generation.generator import Sampled, load_generator
from smpo_pipeline.generation.source import ModelSource
from smpo_pipeline.inversion.generated import GeneratedPair, blank_pixels
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_schemas.generation.candidates import GenerationSettings
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion import test_flow, test_inverter
from tests.inversion.helpers import FlowOracle, Oracle, make_pair
from tests.tiny.families import FLOW_FAMILIES
from tests.tiny.stable_diffusion import make_tiny_model

SEED, SIDE, STEPS = 5, 32, 4
KINDS = {"sd15": make_tiny_model, **{kind: FLOW_FAMILIES[kind] for kind in ("flux1-dev", "qwen-image")}}
"""A UNet, packed latents with the guidance told, and a VAE of 5-D tensors with texts of any length."""

PROMPTS = ("a cat and a dog", "dog")


def sample_pairs(folder: Path, dtype: str = "fp32", patch=lambda _generator: None) -> list[GeneratedPair]:
    """Two images of each prompt by the model's pipeline, with all states of every second step."""
    generator = load_generator(ModelSource("base", str(folder), "pipeline"), None, "cpu", dtype, sampler="ddim")
    patch(generator)
    settings = GenerationSettings(
        sampler="DDIM",
        steps=STEPS,
        guidance_scale=1.0,
        seed=7,
        dtype=dtype,
        resolution=SIDE,
        images_per_prompt=2,
        image_format="png",
        keep="states:2",
    )
    wanted = [(prompt, index) for prompt in PROMPTS for index in range(2)]
    made = generator.sample(wanted, settings, [(0, 2)] * len(wanted))
    return [as_pair(made[first : first + 2], dtype) for first in (0, 2)]


def as_pair(images: list[Sampled], dtype: str) -> GeneratedPair:
    times = sorted(images[0].states_Chw)
    latents = [torch.stack([image.latents_Chw, *(image.states_Chw[t] for t in times)]) for image in images]
    return GeneratedPair(torch.stack(latents, 1).numpy(), [(7, index, dtype) for index in range(2)], tuple(times))


def prepared(pairs: list[GeneratedPair]):
    return [
        dataclasses.replace(
            make_pair(number),
            prompt=prompt,
            pixels_2HW3=blank_pixels(SIDE),
            size=((SIDE, SIDE),) * 2,
            crop=((0, 0),) * 2,
            generated=pair,
        )
        for number, (prompt, pair) in enumerate(zip(PROMPTS, pairs, strict=True))
    ]


def settings_of(source: str, **more) -> InversionSettings:
    return InversionSettings(source=source, hflip=False, prompt_dropout=0, **more)


def invert(family, pairs, settings: InversionSettings, batch_size: int = 2):
    inverter = Inverter(family, family.denoiser, settings, SEED)
    requests = [(pair, 0) for pair in prepared(pairs)]
    parts = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    made = [inverter.invert(part) for part in parts]
    return [sample for samples, _ in made for sample in samples], made[0][1]


@pytest.fixture(scope="module", params=KINDS)
def world(request, tmp_path_factory):
    folder = KINDS[request.param](tmp_path_factory.mktemp("model"), seed=3)
    unet = request.param == "sd15"
    return SimpleNamespace(
        folder=folder,
        family=load_family(str(folder)),
        pairs=sample_pairs(folder),
        oracle=Oracle(folder, "epsilon") if unet else FlowOracle(folder),
        check_state=(test_inverter if unet else test_flow).check_state,
        flow=not unet,
    )


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tracked", "sampled"])
def test_every_stored_tensor_equals_a_float64_computation(world, source: str) -> None:
    samples, health = invert(world.family, world.pairs, settings_of(source, steps=3))
    for sample, pair, prompt in zip(samples, world.pairs, PROMPTS, strict=True):
        torch.testing.assert_close(sample.x0_2Chw, torch.from_numpy(pair.latents_K2Chw[0]).half(), rtol=0, atol=0)
        assert sample.residual_K2.isnan().all()
        assert not sample.meta.flipped
        assert (sample.meta.size, sample.meta.crop) == (((SIDE, SIDE),) * 2, ((0, 0),) * 2)
        text = world.oracle.embed(prompt, (SIDE, SIDE), (0, 0))
        for k, t in enumerate(sample.timestep_K.tolist()):
            for image in range(2):
                noise = image_noise(7, prompt, image, pair.latents_K2Chw.shape[2:])
                if source == "tracked":
                    x0 = sample.x0_2Chw[image].double()
                    x_t = world.oracle.a(t) * x0 + world.oracle.s(t) * noise.double()
                    assert torch.equal(sample.noise_K2Chw[k, image], noise.half())
                else:
                    x_t = torch.from_numpy(pair.latents_K2Chw[1 + k, image]).double()
                world.check_state(world.oracle, sample, k, image, text, x_t)
        if source == "sampled":
            assert sample.timestep_K.tolist() == pytest.approx(pair.timesteps, rel=1e-7)
        if source == "sampled" and world.flow:  # the sampler begins at pure noise
            assert 999.9999 < sample.timestep_K[-1] < 1000
            torch.testing.assert_close(
                sample.noise_K2Chw[-1].float(), pair.initial_noise(prompt), rtol=2**-10, atol=1e-6
            )
    assert sum(band.states for band in health.bands(1000)) == 2 * len(samples) * len(samples[0].timestep_K)


@pytest.mark.slow
def test_states_do_not_depend_on_the_batch(world) -> None:
    for settings in (settings_of("tracked"), settings_of("sampled", states=1)):
        (together, _), (alone, _) = (invert(world.family, world.pairs, settings, size) for size in (2, 1))
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one.noise_K2Chw, other.noise_K2Chw)
            assert torch.equal(one.timestep_K, other.timestep_K)
            torch.testing.assert_close(one.ref_error_K2, other.ref_error_K2, rtol=1e-4, atol=1e-6)
            assert one.noise_K2Chw.shape[0] == (settings.states or settings.steps)


def test_noise_is_what_the_sampler_rounded_it_to(world) -> None:
    pairs = sample_pairs(world.folder, "bf16")
    noise = torch.stack([image_noise(7, PROMPTS[0], image, pairs[0].latents_K2Chw.shape[2:]) for image in range(2)])
    assert torch.equal(pairs[0].initial_noise(PROMPTS[0]), noise.bfloat16().float())
    np.testing.assert_array_equal(pairs[0].latents_K2Chw[-1], noise.bfloat16().float())


def test_a_denoiser_that_returns_the_noise_has_no_error(world, monkeypatch) -> None:
    """The velocity of a flow model is noise - x0."""
    pair, (prompt, _) = world.pairs[0], PROMPTS
    noise, x0 = pair.initial_noise(prompt), torch.from_numpy(pair.latents_K2Chw[0])
    monkeypatch.setattr(world.family, "denoise", lambda *_: noise - x0 if world.flow else noise)
    inverter = Inverter(world.family, world.family.denoiser, settings_of("tracked"), SEED)
    request = dataclasses.replace(prepared(world.pairs)[0], measured=False)
    (sample,), _ = inverter.invert([(request, 0)])
    assert float(sample.ref_error_K2.max()) < (2**-11 * 6) ** 2


def test_a_straight_path_is_tracked_at_every_node(tmp_path: Path) -> None:
    """Under a constant velocity Euler's samples are (1 - u) x0 + u x_T: both sources have the noise as tau."""
    folder = FLOW_FAMILIES["sd35"](tmp_path, seed=3)
    velocity = torch.randn((4, *load_family(str(folder), ()).latent_shape(SIDE, SIDE)))

    def patch(generator) -> None:
        generator.pipeline.transformer.forward = lambda **_: (velocity,)

    pairs = sample_pairs(folder, patch=patch)
    for pair, prompt in zip(pairs, PROMPTS, strict=True):
        noise_2Chw = pair.initial_noise(prompt)
        for t, x_2Chw in zip(pair.timesteps, pair.latents_K2Chw[1:], strict=True):
            straight = (1 - t / 1000) * torch.from_numpy(pair.latents_K2Chw[0]) + t / 1000 * noise_2Chw
            torch.testing.assert_close(torch.from_numpy(x_2Chw), straight, atol=1e-5, rtol=1e-5)
    family = load_family(str(folder))
    (tracked, *_), _ = invert(family, pairs, settings_of("tracked"))
    (sampled, *_), _ = invert(family, pairs, settings_of("sampled"))
    for tau_2Chw in sampled.noise_K2Chw:
        # x0 is rounded to float16, and the error divided by sigma.
        torch.testing.assert_close(tau_2Chw.float(), tracked.noise_K2Chw[0].float(), atol=4e-3, rtol=2**-10)


def test_without_kept_states_nothing_is_planned_beyond_them() -> None:
    schedule = SimpleNamespace(num_train_timesteps=1000)
    kept = (100.0, 250.0, 1000.0)
    plan = plan_trajectory(settings_of("sampled", states=2), schedule, 0, "pair", 0, tokens=4, kept=kept)
    assert plan.nodes[:2] == kept[:2]
    assert math.nextafter(1000, 0) - plan.nodes[2] < 1e-4
    assert len(plan.stored) == len(plan.used_at) == 2
