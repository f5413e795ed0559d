"""Flow models against their stock diffusers pipelines: what the denoiser is given, latents, images."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils import checkpoint as torch_checkpoint

from smpo_common.errors import UserError
from smpo_models.family import Conditioning, Family
from smpo_models.loading import load_family
from smpo_models.noise_schedules.base import START
from smpo_models.sampling import load_pipeline, sample
from smpo_schemas.shards.text_rows import MASK, TextRow, split_rows, stack_rows
from tests.models.denoiser_calls import Calls
from tests.models.stock import SHAPE, Stock, load_stock
from tests.tiny.families import FAMILIES
from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.tiny.qwen import make_tiny_klein, make_tiny_qwen_image

PROMPTS = ["a cat", "a cat and a dog " * 40, ""]
"""Of different lengths; the second is longer than either CLIP tokenizer takes."""

STEPS = 4

MODELS: dict[str, Callable] = FAMILIES | {
    "sd3": lambda path: make_tiny_sd3(path, version="3"),
    "sd3-without-t5": lambda path: make_tiny_sd3(path, version="3", t5=False),
    "sd35-dynamic": lambda path: make_tiny_sd3(path, use_dynamic_shifting=True),
    "flux1-schnell": lambda path: make_tiny_flux(path, guided=False),
}


@pytest.fixture(scope="module", params=MODELS)
def world(request, tmp_path_factory) -> tuple[Family, Stock]:
    folder = MODELS[request.param](tmp_path_factory.mktemp(request.param))
    # diffusers loads a pipeline without a part only where it is told so.
    parts = {"text_encoder_3": None, "tokenizer_3": None} if request.param == "sd3-without-t5" else {}
    return load_family(str(folder)), load_stock(folder, **parts)


def make_noise(family: Family) -> torch.Tensor:
    return torch.randn(len(PROMPTS), *family.latent_shape(*SHAPE), generator=torch.Generator().manual_seed(1))


def condition(family: Family, prompts: Sequence[str | None]) -> Conditioning:
    """Encode prompts, and for None what the pipeline guides with; then the empty prompt stands for it, too."""
    rows: dict[str | None, TextRow] = {}
    for some in ([None], [prompt for prompt in prompts if prompt is not None]):
        family.encodes_empty_prompt = None not in some
        rows |= (
            zip(some, split_rows(family.encode_text([prompt or "" for prompt in some])), strict=True) if some else ()
        )
    family.encodes_empty_prompt = False
    text = stack_rows([rows[prompt] for prompt in prompts])
    return family.conditioning(text, [SHAPE] * len(prompts), [(0, 0)] * len(prompts))


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_the_denoiser_is_given_what_the_pipeline_gives_it(world, guidance):
    """Some pipelines guide by a second half of the batch, some by another forward, and FLUX.1's tells dev the scale."""
    family, stock = world
    theirs, ours = Calls(stock.pipeline.transformer, stock.positional), Calls(family.denoiser, stock.positional)
    stock.run(PROMPTS, make_noise(family), guidance, STEPS)
    if family.embedded_guidance is not None:
        family.embedded_guidance = guidance
    forwards = [(prompts, condition(family, prompts)) for prompts in stock.forwards(PROMPTS, guidance)]
    timesteps = [t for t in reversed(family.noise_schedule.grid(STEPS, family.num_tokens(*SHAPE))) for _ in forwards]
    for t, (prompts, conditioning), given, output in zip(
        timesteps, forwards * STEPS, theirs.given, theirs.output, strict=True
    ):
        x = stock.noisy(given)
        t_B = torch.full((len(prompts),), t, dtype=family.noise_schedule.timestep_dtype)
        found = family.denoise(family.denoiser, x, t_B, conditioning)
        handed, wanted = stock.given(ours.given[-1]), stock.given(given)
        assert handed.keys() == wanted.keys()
        for name, value in wanted.items():
            if not torch.is_tensor(value):
                assert handed[name] == value, name
                continue
            # Embeddings of other batches have other last bits.
            tolerance = 1e-5 if name.startswith(("pooled_projections", "encoder_hidden_states")) else 0
            torch.testing.assert_close(handed[name], value, rtol=tolerance, atol=tolerance, msg=name)
        torch.testing.assert_close(found, stock.velocity(output), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_sampling_by_the_schedule_gives_the_pipelines_latents(world, guidance):
    family, stock = world
    noise = make_noise(family)
    wanted = stock.run(PROMPTS, noise, guidance, STEPS)
    if family.embedded_guidance is not None:
        family.embedded_guidance = guidance
    schedule = family.noise_schedule
    conditioning, unconditional = condition(family, PROMPTS), condition(family, [None] * len(PROMPTS))
    guides = any(None in prompts for prompts in stock.forwards(PROMPTS, guidance))
    grid = [float(START), *schedule.grid(STEPS, family.num_tokens(*SHAPE))]
    x = noise
    for s, t in zip(grid[-2::-1], grid[::-1], strict=False):
        t_B, s_B = (torch.full((len(x),), time, dtype=schedule.timestep_dtype) for time in (t, s))
        output = family.denoise(family.denoiser, x, t_B, conditioning)
        if guides:
            output = stock.guided(output, family.denoise(family.denoiser, x, t_B, unconditional), guidance)
        x = schedule.noised(schedule.x0_in(output, x, t_B), schedule.noise_in(output, x, t_B), s_B)
    assert float((x - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_latents_and_images_are_the_pipelines(world):
    family, stock = world
    latents = stock.run(PROMPTS, make_noise(family), 1.0, STEPS)
    images = stock.run(PROMPTS, make_noise(family), 1.0, STEPS, "pt")
    torch.testing.assert_close(family.decode(latents) / 2 + 0.5, images, rtol=1e-5, atol=1e-5)
    pixels = torch.rand(2, 3, *SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for found, wanted in zip(family.posterior(pixels), stock.posterior(pixels), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_prompts_embedding_does_not_depend_on_the_others(world):
    family, _ = world
    together = family.encode_text([*PROMPTS, PROMPTS[0]])
    if "mask" in together:
        assert not together["text"][~together["mask"]].any()
    for row, prompt in zip(split_rows(together), [*PROMPTS, PROMPTS[0]], strict=True):
        (alone,) = split_rows(family.encode_text([prompt]))
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-6)
    assert family.cuts(PROMPTS[1])
    assert not family.cuts(PROMPTS[0])


@torch.no_grad()
def test_the_longest_text_is_that_of_a_prompt_that_is_cut(world):
    """By configs alone, and without a mask: the denoiser sees all of it."""
    family, _ = world
    made, longest = family.encode_text([PROMPTS[1]] * 2), family.longest_text(2)
    assert {name: value.shape for name, value in made.items() if name != MASK} == {
        name: value.shape for name, value in longest.items()
    }
    x = torch.randn(2, *family.latent_shape(*SHAPE), generator=torch.Generator().manual_seed(1))
    t_B = torch.full((2,), 500, dtype=family.noise_schedule.timestep_dtype)
    outputs = [
        family.denoise(family.denoiser, x, t_B, family.conditioning(text, [SHAPE] * 2, [(0, 0)] * 2))
        for text in (longest, longest | {MASK: made[MASK]} if MASK in made else longest)
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Facts:
    """What a family says of the tiny model, by its config or by its pipeline's defaults."""

    kind: str
    resolution: int
    limits: tuple[int, int | None]
    steps: int = 28
    guidance: float | None = None
    latents: tuple[int, int, int] = (4, 8, 16)
    multiple: int = 8
    tokens: int = 32
    schedule_steps: int | None = None


SD3, FLUX = {"resolution": 32, "limits": (16, 128)}, {"resolution": 512, "limits": (256, None)}
"""SD3's transformer names 8 latents of 4 pixels; FLUX.1's names no size, its pipeline 128."""

FACTS = {
    "sd3": Facts("sd3", guidance=7.0, **SD3),
    "sd3-without-t5": Facts("sd3", guidance=7.0, **SD3),
    "sd35": Facts("sd35", guidance=4.5, **SD3),
    "sd35-dynamic": Facts("sd35", guidance=4.5, **SD3),
    "flux1-dev": Facts("flux1-dev", guidance=3.5, **FLUX),
    "flux1-schnell": Facts("flux1-schnell", steps=4, **FLUX),
    "qwen-image": Facts("qwen-image", steps=50, guidance=4.0, schedule_steps=50, **FLUX),
    "pixart-sigma": Facts("pixart-sigma", 32, (16, None), steps=20, guidance=4.5),
    # Its tiny table holds 64 positions of 8 pixels.
    "z-image": Facts("z-image", 512, (256, 512), steps=50, guidance=6.0),
    # Its tiny table holds 32 positions of 8 pixels; its pipeline counts the channels for tokens.
    "lumina2": Facts("lumina2", 32, (16, 256), steps=30, guidance=4.0, tokens=4),
    "sana": Facts("sana", 32, (16, None), steps=20, guidance=4.5, multiple=32, tokens=128),
    "flux2-klein": Facts(
        "flux2-klein", 256, (128, None), steps=50, guidance=4.0, schedule_steps=50, multiple=4, tokens=128
    ),
}


def test_what_a_family_says_of_itself(world, request):
    family, _ = world
    facts, settings = FACTS[request.node.callspec.params["world"]], family.settings()
    assert family.denoiser_folder == "transformer"
    assert facts == Facts(
        kind=family.kind,
        resolution=family.resolution(),
        limits=family.resolution_limits(),
        steps=family.sampler_steps,
        guidance=family.usual_guidance,
        latents=family.latent_shape(*SHAPE),
        multiple=family.resolution_multiple(),
        tokens=family.num_tokens(*SHAPE),
        schedule_steps=settings["sampler_steps"],
    )
    assert len(settings["text"]) == len(settings["tokenizers"]) == len(family.text_modules)


def test_the_guidance_that_a_denoiser_is_told_is_recorded(tmp_path):
    dev = load_family(str(make_tiny_flux(tmp_path / "dev")))
    assert dev.settings()["embedded_guidance"] == 1
    dev.embedded_guidance = 3.5
    assert dev.settings()["embedded_guidance"] == 3.5
    schnell = load_family(str(make_tiny_flux(tmp_path / "schnell", guided=False)))
    assert schnell.settings()["embedded_guidance"] is None


def test_idle_layers_are_those_without_a_gradient(world):
    family, _ = world
    denoiser = copy.deepcopy(family.denoiser).requires_grad_(True)
    t_B = torch.full((len(PROMPTS),), 500.0).to(family.noise_schedule.timestep_dtype)
    family.denoise(denoiser, make_noise(family), t_B, condition(family, PROMPTS)).sum().backward()
    named = dict(denoiser.named_parameters())
    without = {name for name, parameter in named.items() if parameter.grad is None}
    assert without == {name for name in named if name.startswith(family.idle_layers)}


def test_gradient_checkpointing_gives_the_same_gradients(world, monkeypatch):
    family, _ = world
    t_B = torch.full((len(PROMPTS),), 500.0).to(family.noise_schedule.timestep_dtype)
    conditioning, calls, gradients = condition(family, PROMPTS), [], []
    compute = torch_checkpoint.checkpoint
    monkeypatch.setattr(torch_checkpoint, "checkpoint", lambda *a, **k: (calls.append(1), compute(*a, **k))[1])
    for recomputes in (False, True):
        denoiser = copy.deepcopy(family.denoiser).requires_grad_(True)
        if recomputes:
            denoiser.enable_gradient_checkpointing()
        family.denoise(denoiser, make_noise(family), t_B, conditioning).square().mean().backward()
        assert bool(calls) == recomputes
        gradients.append({name: each.grad for name, each in denoiser.named_parameters() if each.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_lora_targets_are_layers_of_the_denoiser(world):
    family, _ = world
    names = [name for name, _ in family.denoiser.named_modules()]
    for target in family.lora_targets:
        assert any(name.endswith(f".{target}") for name in names), target


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_a_folder_with_a_missing_part_is_one_line(tmp_path, make):
    whole = make(tmp_path / "whole")
    for part in [path.name for path in whole.iterdir() if path.is_dir()]:
        folder = shutil.copytree(whole, tmp_path / part)
        shutil.rmtree(folder / part)
        with pytest.raises(UserError, match=f"--model {folder} cannot be loaded"):
            load_family(str(folder))


@pytest.mark.parametrize("make", [FAMILIES[name] for name in ("sd35", "flux1-dev", "qwen-image", "z-image")])
def test_a_scheduler_with_another_grid_is_one_line(tmp_path, make):
    folder = make(tmp_path, use_karras_sigmas=True)
    with pytest.raises(UserError, match=f"--model {folder}: its scheduler's config sets use_karras_sigmas"):
        load_family(str(folder))


def with_setting(folder: Path, file: str, **settings: object) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "distilled klein": (
        lambda path: make_tiny_klein(path, distilled=True),
        r"was distilled to a few steps \(is_distilled in model_index.json\).* take its base model, FLUX.2-klein-base",
    ),
    "klein that is told a scale": (
        lambda path: with_setting(make_tiny_klein(path), "transformer/config.json", guidance_embeds=True),
        "its transformer takes a guidance scale, which no FLUX.2-klein does",
    ),
    "klein with other patches": (
        lambda path: with_setting(make_tiny_klein(path), "vae/config.json", patch_size=[1, 1]),
        r"its VAE's config sets patch_size \[1, 1\]; only 2 x 2 is known",
    ),
    "Qwen-Image-Edit": (
        lambda path: with_setting(make_tiny_qwen_image(path), "model_index.json", _class_name="QwenImageEditPipeline"),
        "is a QwenImageEditPipeline; known: .*QwenImagePipeline",
    ),
    "Qwen-Image of layers": (
        lambda path: with_setting(make_tiny_qwen_image(path), "transformer/config.json", use_layer3d_rope=True),
        "its transformer's config sets use_layer3d_rope, as models that edit images or draw layers do",
    ),
    "Qwen-Image with transparency": (
        lambda path: with_setting(make_tiny_qwen_image(path), "vae/config.json", input_channels=4),
        "its VAE reads 4 channels, as of layered images; only RGB is known",
    ),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_not_known_is_refused_by_its_configs(tmp_path, make, said):
    with pytest.raises(UserError, match=f"^--model {tmp_path}.*{said}"):
        load_family(str(make(tmp_path)), ())


def test_another_denoiser_must_be_of_the_same_shape(tmp_path):
    folder = make_tiny_flux(tmp_path / "dev")
    other = make_tiny_flux(tmp_path / "schnell", guided=False)
    with pytest.raises(UserError, match="schnell has guidance_embeds False, the one of --model"):
        load_family(str(folder), ("denoiser",), denoiser=other)
    own = load_family(str(folder), ("denoiser",), denoiser=make_tiny_flux(tmp_path / "tuned", seed=1))
    assert own.denoiser is not None


@pytest.mark.slow
@torch.no_grad()
def test_a_loaded_pipeline_takes_first_order_steps_from_unpacked_noise(world):
    """As the stock pipeline does with such a scheduler; both ways around the denoiser that is handed in."""
    family, stock = world
    noise = make_noise(family)
    pipeline = load_pipeline(
        family._model,
        "--model m",
        {family.denoiser_folder: family.denoiser},
        dtype=torch.float32,
        variant=None,
        sampler="ddim",
    )
    assert pipeline.transformer is family.denoiser
    for guidance in (1.0, 3.0):
        if family.usual_guidance is None and guidance > 1:
            continue
        found = sample(pipeline, family, PROMPTS, noise, steps=STEPS, guidance_scale=guidance, output_type="latent")
        wanted = stock.run(PROMPTS, noise, guidance, STEPS)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
