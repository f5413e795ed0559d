"""A loaded model samples each image alike, whatever its batch and its sampler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from smpo_pipeline.generation.generator import load_generator
from smpo_pipeline.generation.source import ModelSource
from smpo_pipeline.isolation import run_isolated
from smpo_schemas.generation.candidates import GenerationSettings
from tests.tiny.stable_diffusion import make_tiny_model, put_scheduler

WANTED = [("a cat", 0), ("a dog", 0), ("a cat", 1)]
SETTINGS = GenerationSettings(
    sampler="any",
    steps=4,
    guidance_scale=3.0,
    seed=0,
    dtype="fp32",
    resolution=32,
    images_per_prompt=2,
    image_format="png",
    keep=None,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PNDMScheduler, {"skip_prk_steps": True}),
        (UniPCMultistepScheduler, {}),
        (EulerAncestralDiscreteScheduler, {}),
    ],
)
def test_batches_and_memory_that_runs_out_in_a_step_change_no_image(
    kind: type[SchedulerMixin], settings: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multistep samplers remember earlier steps, and stochastic ones draw noise in each."""
    folder = put_scheduler(make_tiny_model(tmp_path), kind, **settings)
    generator = load_generator(ModelSource("m", str(folder), "pipeline"), None, "cpu", "fp32")
    assert type(generator.pipeline.scheduler) is kind
    alone = [generator.sample([each], SETTINGS)[0].latents_Chw for each in WANTED]
    forward, calls = UNet2DConditionModel.forward, []

    def failing(unet: UNet2DConditionModel, latents: torch.Tensor, *more: object, **named: object) -> object:
        calls.append(len(latents))
        if len(latents) > 4 and len(calls) % 3 == 0:  # in the third step, of two predictions an image
            raise MemoryError("out")
        return forward(unet, latents, *more, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", failing)
    outcome = run_isolated(lambda batch: generator.sample(batch, SETTINGS), WANTED, "cpu")
    assert calls[:6] == [6] * 6
    assert outcome.largest_batch == 2
    made = {place: image for places, images in outcome.results for place, image in zip(places, images, strict=True)}
    for place, wanted in enumerate(alone):
        torch.testing.assert_close(made[place].latents_Chw, wanted, atol=2e-3, rtol=2e-3)
