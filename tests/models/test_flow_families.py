"""SD3, SD3.5 and FLUX.1 against their stock diffusers pipelines: what the denoiser is given, latents, images."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline

from smpo_common.errors import UserError
from smpo_models.family import Conditioning, Family
from smpo_models.loading import load_family
from smpo_models.noise_schedules.base import START
from smpo_models.sampling import load_pipeline, sample
from tests.tiny_flow import make_tiny_flux, make_tiny_sd3

PROMPTS = ["a cat", "a cat and a dog " * 40, ""]
"""Of different lengths; the second is longer than either CLIP tokenizer takes."""

SHAPE = (32, 48)
STEPS = 4

MODELS: dict[str, Callable] = {
    "sd3": lambda path: make_tiny_sd3(path, version="3"),
    "sd3-without-t5": lambda path: make_tiny_sd3(path, version="3", t5=False),
    "sd35": make_tiny_sd3,
    "sd35-dynamic": lambda path: make_tiny_sd3(path, use_dynamic_shifting=True),
    "flux1-dev": make_tiny_flux,
    "flux1-schnell": lambda path: make_tiny_flux(path, guided=False),
}


@pytest.fixture(scope="module", params=MODELS)
def world(request, tmp_path_factory) -> tuple[Family, DiffusionPipeline]:
    folder = MODELS[request.param](tmp_path_factory.mktemp(request.param))
    # diffusers loads a pipeline without a part only where it is told so.
    parts = {"text_encoder_3": None, "tokenizer_3": None} if request.param == "sd3-without-t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return load_family(str(folder)), pipeline


class Calls:
    """Records the tensors that a denoiser is given, by name, and its output, at each forward."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.given: list[dict[str, torch.Tensor]] = []
        self.output: list[torch.Tensor] = []
        denoiser.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, _module, args, kwargs, output) -> None:
        assert not args
        self.given.append({name: value for name, value in kwargs.items() if torch.is_tensor(value)})
        self.output.append(output[0])


def run_pipeline(pipeline: DiffusionPipeline, noise: torch.Tensor, guidance: float, output_type: str = "latent"):
    """Sample by the stock pipeline from unpacked noise; latents come back unpacked."""
    flux = type(pipeline).__name__ == "FluxPipeline"
    options = {"guidance_scale": guidance}
    if flux:
        options["max_sequence_length"] = 512 if pipeline.transformer.config.guidance_embeds else 256
    height, width = SHAPE
    start = pipeline._pack_latents(noise, *noise.shape) if flux else noise
    made = pipeline(
        prompt=PROMPTS, latents=start, height=height, width=width, num_inference_steps=STEPS, output_type=output_type,
        **options,
    ).images  # fmt: skip
    return unpack(pipeline, made) if flux and output_type == "latent" else made


def unpack(pipeline: DiffusionPipeline, packed: torch.Tensor) -> torch.Tensor:
    return pipeline._unpack_latents(packed, *SHAPE, pipeline.vae_scale_factor)


def make_noise(family: Family) -> torch.Tensor:
    return torch.randn(len(PROMPTS), *family.latent_shape(*SHAPE), generator=torch.Generator().manual_seed(1))


def condition(family: Family, prompts: list[str]) -> Conditioning:
    return family.condition(prompts, [SHAPE] * len(prompts), [(0, 0)] * len(prompts))


def is_guided(family: Family) -> bool:
    return family.kind.startswith("sd3")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_the_denoiser_is_given_what_the_pipeline_gives_it(world, guidance):
    """SD3's pipeline guides by a second half of the batch; FLUX.1's tells dev's denoiser the scale."""
    family, pipeline = world
    stock, ours = Calls(pipeline.transformer), Calls(family.denoiser)
    run_pipeline(pipeline, make_noise(family), guidance)
    split = is_guided(family) and guidance > 1
    prompts = [""] * len(PROMPTS) + PROMPTS if split else PROMPTS
    if family.embedded_guidance is not None:
        family.embedded_guidance = guidance
    conditioning = condition(family, prompts)
    timesteps = reversed(family.noise_schedule.grid(STEPS, family.num_tokens(*SHAPE)))
    assert len(stock.given) == STEPS
    for t, given, output in zip(timesteps, stock.given, stock.output, strict=True):
        x = given["hidden_states"] if is_guided(family) else unpack(pipeline, given["hidden_states"])
        found = family.denoise(family.denoiser, x, torch.full((len(prompts),), t), conditioning)
        assert ours.given[-1].keys() == given.keys()
        for name, value in given.items():
            # Pooled embeddings are rounded once, from float64, here.
            tolerance = 1e-5 if name in {"pooled_projections", "encoder_hidden_states"} else 0
            torch.testing.assert_close(ours.given[-1][name], value, rtol=tolerance, atol=tolerance, msg=name)
        wanted = output if is_guided(family) else unpack(pipeline, output)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_sampling_by_the_schedule_gives_the_pipelines_latents(world, guidance):
    family, pipeline = world
    noise = make_noise(family)
    wanted = run_pipeline(pipeline, noise, guidance)
    if family.embedded_guidance is not None:
        family.embedded_guidance = guidance
    schedule = family.noise_schedule
    conditioning, empty = condition(family, PROMPTS), condition(family, [""] * len(PROMPTS))
    grid = [float(START), *schedule.grid(STEPS, family.num_tokens(*SHAPE))]
    x = noise
    for s, t in zip(grid[-2::-1], grid[::-1], strict=False):
        t_B, s_B = torch.full((len(x),), t), torch.full((len(x),), s)
        output = family.denoise(family.denoiser, x, t_B, conditioning)
        if is_guided(family) and guidance > 1:
            unconditional = family.denoise(family.denoiser, x, t_B, empty)
            output = unconditional + guidance * (output - unconditional)
        x = schedule.noised(schedule.x0_in(output, x, t_B), schedule.noise_in(output, x, t_B), s_B)
    assert float((x - wanted).norm() / wanted.norm()) < 1e-4


@torch.no_grad()
def test_latents_and_images_are_the_pipelines(world):
    family, pipeline = world
    latents = run_pipeline(pipeline, make_noise(family), 1.0)
    images = run_pipeline(pipeline, make_noise(family), 1.0, "pt")
    torch.testing.assert_close(family.decode(latents) / 2 + 0.5, images, rtol=1e-5, atol=1e-5)
    pixels = torch.rand(2, 3, *SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    found = pipeline.vae.encode(pixels).latent_dist
    mean, std = family.posterior(pixels)
    config = pipeline.vae.config
    torch.testing.assert_close(mean, (found.mean - config.shift_factor) * config.scaling_factor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std, found.std * config.scaling_factor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean / config.scaling_factor + config.shift_factor, found.mean, rtol=1e-5, atol=1e-6)


def test_a_prompts_embedding_does_not_depend_on_the_others(world):
    family, _ = world
    together = family.encode_text([*PROMPTS, PROMPTS[0]])
    for row, prompt in enumerate([*PROMPTS, PROMPTS[0]]):
        for name, value in family.encode_text([prompt]).items():
            torch.testing.assert_close(together[name][row], value[0], rtol=1e-5, atol=1e-6)
    assert family.cuts(PROMPTS[1])
    assert not family.cuts(PROMPTS[0])


def test_what_a_family_says_of_itself(world, request):
    family, _ = world
    name = request.node.callspec.params["world"]
    assert family.kind == {"sd3-without-t5": "sd3", "sd35-dynamic": "sd35"}.get(name, name)
    assert family.denoiser_folder == "transformer"
    assert family.latent_shape(*SHAPE) == (4, 8, 12)
    assert (family.resolution_multiple(), family.num_tokens(*SHAPE)) == (8, 24)
    # A transformer of 8 latents of 4 pixels; FLUX.1's config names no size, its pipeline 128.
    assert family.resolution() == (32 if is_guided(family) else 512)
    assert family.resolution_limits() == ((16, 128) if is_guided(family) else (256, None))
    settings = family.settings()
    assert family.sampler_steps == (4 if name == "flux1-schnell" else 28)
    # No published schedule depends on it.
    assert settings["sampler_steps"] is None
    assert len(settings["text"]) == len(settings["tokenizers"]) == len(family.text_modules)


def test_the_guidance_that_a_denoiser_is_told_is_recorded(tmp_path):
    dev = load_family(str(make_tiny_flux(tmp_path / "dev")))
    assert dev.settings()["embedded_guidance"] == 1
    dev.embedded_guidance = 3.5
    assert dev.settings()["embedded_guidance"] == 3.5
    schnell = load_family(str(make_tiny_flux(tmp_path / "schnell", guided=False)))
    assert schnell.settings()["embedded_guidance"] is None


def test_lora_targets_are_layers_of_the_denoiser(world):
    family, _ = world
    names = [name for name, _ in family.denoiser.named_modules()]
    for target in family.lora_targets:
        assert any(name.endswith(f".{target}") for name in names), target


@pytest.mark.parametrize("make", [make_tiny_sd3, make_tiny_flux])
def test_a_folder_with_a_missing_part_is_one_line(tmp_path, make):
    whole = make(tmp_path / "whole")
    for part in [path.name for path in whole.iterdir() if path.is_dir()]:
        folder = shutil.copytree(whole, tmp_path / part)
        shutil.rmtree(folder / part)
        with pytest.raises(UserError, match=f"--model {folder} cannot be loaded"):
            load_family(str(folder))


@pytest.mark.parametrize("make", [make_tiny_sd3, make_tiny_flux])
def test_a_scheduler_with_another_grid_is_one_line(tmp_path, make):
    folder = make(tmp_path, use_karras_sigmas=True)
    with pytest.raises(UserError, match=f"--model {folder}: its scheduler's config sets use_karras_sigmas"):
        load_family(str(folder))


def test_another_denoiser_must_be_of_the_same_shape(tmp_path):
    folder = make_tiny_flux(tmp_path / "dev")
    other = make_tiny_flux(tmp_path / "schnell", guided=False)
    with pytest.raises(UserError, match="schnell has guidance_embeds False, the one of --model"):
        load_family(str(folder), ("denoiser",), denoiser=other)
    own = load_family(str(folder), ("denoiser",), denoiser=make_tiny_flux(tmp_path / "tuned", seed=1))
    assert own.denoiser is not None


def test_a_loaded_pipeline_samples_by_its_own_scheduler_from_unpacked_noise(world):
    """As validation images are drawn; both ways around the denoiser that is handed in."""
    family, stock = world
    noise = make_noise(family)
    pipeline = load_pipeline(
        family._model,
        "--model m",
        {family.denoiser_folder: family.denoiser},
        dtype=torch.float32,
        variant=None,
    )
    assert pipeline.transformer is family.denoiser
    with torch.no_grad():
        found = sample(pipeline, PROMPTS, noise, steps=STEPS, guidance_scale=1.0, output_type="latent")
        wanted = stock(
            prompt=PROMPTS,
            height=SHAPE[0],
            width=SHAPE[1],
            latents=stock._pack_latents(noise, *noise.shape) if not is_guided(family) else noise,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            output_type="latent",
        ).images
    torch.testing.assert_close(found, wanted if is_guided(family) else unpack(stock, wanted), rtol=1e-4, atol=1e-5)
