"""Sampling with a model's own scheduler or its first-order one, and what is watched meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from smpo_common.errors import UserError
from smpo_models.draws import torch_generator
from smpo_models.loading import load_family
from smpo_models.sampling import load_pipeline, sample
from smpo_schemas.choices import SamplerChoice
from tests.models.test_flow_families import MODELS as FLOW_MODELS
from tests.models.test_flow_families import SHAPE
from tests.tiny.flow import make_tiny_sd3
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_xl, put_scheduler
from tests.tiny.transformers import make_tiny_sana

MODELS: dict[str, Callable[[Path], Path]] = {"sd15": make_tiny_model, **FLOW_MODELS}
STEPS = 4


def with_scheduler(kind: type[SchedulerMixin], **settings: object) -> Callable[[Path], Path]:
    return lambda path: put_scheduler(make_tiny_model(path), kind, **settings)


OWN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "sd15": (with_scheduler(PNDMScheduler, skip_prk_steps=True), "PNDMScheduler"),
    "dpmsolver++": (with_scheduler(DPMSolverMultistepScheduler), "DPMSolverMultistepScheduler"),
    "ancestral": (with_scheduler(EulerAncestralDiscreteScheduler), "EulerAncestralDiscreteScheduler"),
    "clipped": (with_scheduler(DDIMScheduler, clip_sample=True), "DDIMScheduler"),
    "ddim": (make_tiny_model, "DDIM"),
    "sdxl": (make_tiny_xl, "EulerDiscreteScheduler"),
    "sd35": (make_tiny_sd3, "Euler"),
    "sana": (make_tiny_sana, "DPMSolverMultistepScheduler"),
}
"""Makers of folders, and the name of the own sampler."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_last_watched_latents_are_the_pipelines(kind: str, tmp_path: Path) -> None:
    folder = str(MODELS[kind](tmp_path / "model"))
    family = load_family(folder, ())
    pipeline = load_pipeline(folder, folder, {}, dtype=torch.float32, variant=None)
    shape = family.latent_shape(*SHAPE)
    noise_BChw = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    seen: dict[int, torch.Tensor] = {}
    options = {"steps": 3, "guidance_scale": family.usual_guidance}
    with torch.inference_mode():
        latents_BChw = sample(
            pipeline,
            family,
            ["a cat", "a dog"],
            noise_BChw,
            **options,
            output_type="latent",
            watch=lambda step, x_BChw: seen.update({step: x_BChw.clone()}),
        )
    assert list(seen) == [0, 1, 2]
    assert seen[0].shape == (2, *shape)
    # FLUX.2's pipeline gives them in the VAE's scale, from which they are normalised again.
    torch.testing.assert_close(seen[2], latents_BChw, atol=1e-6, rtol=1e-5)
    # Nothing is left behind.
    assert "step" not in vars(pipeline.scheduler)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN)
def test_the_models_own_sampler_is_the_stock_pipelines(kind: str, tmp_path: Path) -> None:
    make, name = OWN[kind]
    folder = str(make(tmp_path / "model"))
    family = load_family(folder, ())
    assert family.samplers["model"] == name
    noise_BChw = torch.randn((2, *family.latent_shape(32, 32)), generator=torch.Generator().manual_seed(0))
    prompts, options = ["a cat", "a dog"], {"steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}

    def drawn(sampler: SamplerChoice) -> torch.Tensor:
        pipeline = load_pipeline(folder, folder, {}, dtype=torch.float32, variant=None, sampler=sampler)
        generators = [torch_generator(prompt) for prompt in prompts]
        with torch.inference_mode():
            return sample(pipeline, family, prompts, noise_BChw, generators=generators, **options)

    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    wanted = stock(
        prompts,
        height=32,
        width=32,
        latents=noise_BChw,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=[torch_generator(prompt) for prompt in prompts],
        output_type="latent",
        **({"use_resolution_binning": False} if kind == "sana" else {}),
    ).images
    own_BChw = drawn("model")
    assert torch.equal(own_BChw, wanted)
    # Stable Diffusion's pipeline itself corrects a scheduler that clips.
    is_first_order = name == family.samplers["ddim"] or kind == "clipped"
    assert torch.equal(own_BChw, drawn("ddim")) == is_first_order


def test_a_scheduler_that_draws_for_the_whole_batch_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "DPMSolverSDEScheduler"))
    assert load_family(str(folder), ()).samplers["model"] == "DPMSolverSDEScheduler"
    with pytest.raises(UserError, match="--model m: its DPMSolverSDEScheduler draws .* give --sampler ddim"):
        load_pipeline(str(folder), "--model m", {}, dtype=torch.float32, variant=None)
