"""What is kept of sampling: each state with its timestep, and the final latents, in every family's one form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smpo_models.draws import image_noise
from smpo_models.loading import load_family
from smpo_models.noise_schedules.base import START
from smpo_pipeline.generation.generator import load_generator
from smpo_pipeline.generation.source import ModelSource
from smpo_schemas.generation.candidates import GenerationSettings
from tests.tiny.families import FAMILIES
from tests.tiny.stable_diffusion import make_tiny_model

MODELS = {"sd15": make_tiny_model, **FAMILIES}
STEPS = 4
"""A divisor of 1000: DDIM's step to the next trailing timestep is off by one for others."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_from_each_state_gives_the_next_and_from_the_last_the_latents(kind: str, tmp_path: Path) -> None:
    """At the timestep of its label, by the formula of the sampler's step: a wrong label gives another state."""
    folder = str(MODELS[kind](tmp_path, seed=3))
    family, schedule = load_family(folder), load_family(folder, ()).noise_schedule
    generator = load_generator(ModelSource("base", folder, "pipeline"), None, "cpu", "fp32", sampler="ddim")
    side = family.resolution()
    settings = GenerationSettings(
        sampler="DDIM",
        steps=STEPS,
        guidance_scale=None if family.usual_guidance is None else 1.0,
        seed=0,
        dtype="fp32",
        resolution=side,
        images_per_prompt=2,
        image_format="png",
        keep=f"states:{STEPS}",
    )
    wanted = [("a cat", 0), ("a cat", 1)]
    images = generator.sample(wanted, settings, [range(STEPS)] * 2)
    times = list(images[0].states_Chw)
    x_BChw = torch.stack([image_noise(0, *each, family.latent_shape(side, side)) for each in wanted])
    conditioning = family.condition(["a cat"] * 2, [(side, side)] * 2, [(0, 0)] * 2)
    for t, s in zip(times, [*times[1:], START], strict=True):
        kept = torch.stack([image.states_Chw[t] for image in images])
        torch.testing.assert_close(kept, x_BChw, atol=2e-5, rtol=1e-4)
        t_B, s_B = (torch.full((2,), time, dtype=schedule.timestep_dtype) for time in (t, s))
        output = family.denoise(family.denoiser, kept, t_B, conditioning)
        x_BChw = schedule.carry(kept, schedule.direction(output, kept, t_B), t_B, s_B)
    latents = torch.stack([image.latents_Chw for image in images])
    torch.testing.assert_close(latents, x_BChw, atol=2e-5, rtol=1e-4)
