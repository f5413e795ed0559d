"""Images of fixed prompts and noise in the course of a run."""

from __future__ import annotations

from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smpo_trainer.validation_images import _noise
from tests.tiny import IMAGE_SIDE, LATENT_SHAPE
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, metrics, run_cli

PROMPTS = ("a cat", "a dog and a cat", "ünïcödé 猫")
CLOCK = ("pairs_per_second", "data_wait_percent", "memory_gib")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


def drawn(out: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((out / "validation").iterdir())}


def by_a_stock_pipeline(model: Path, unet: Path, guidance: float) -> list[np.ndarray]:
    denoiser = UNet2DConditionModel.from_pretrained(unet)
    pipeline = StableDiffusionPipeline.from_pretrained(model, unet=denoiser)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = []
    for number, prompt in enumerate(PROMPTS):
        latents = torch.from_numpy(_noise(0, number, LATENT_SHAPE))[None]
        found = pipeline(prompt, latents=latents, num_inference_steps=4, guidance_scale=guidance, output_type="np")
        images.append(found.images[0])
    return images


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_they_are_what_a_stock_pipeline_draws(
    train: Train, model: Path, prompts: Path, ema_decay: float | None
) -> None:
    """The last ones with the weights that are saved, the first ones with the base model's."""
    out = train(
        validation_prompts=prompts, validation_every=2, validation_sampling_steps=4, validation_guidance_scale=3,
        max_steps=3, ema_decay=ema_decay, lr=1e-2,
    )  # fmt: skip
    found = drawn(out)
    assert list(found) == ["step-000000.png", "step-000002.png", "step-000003.png"]
    for name, unet in (("step-000000.png", model / "unet"), ("step-000003.png", out / "unet")):
        grid = found[name]
        assert grid.shape == (2 * IMAGE_SIDE, 2 * IMAGE_SIDE, 3)
        wanted = by_a_stock_pipeline(model, unet, 3.0)
        for number, image in enumerate(wanted):
            top, left = IMAGE_SIDE * (number // 2), IMAGE_SIDE * (number % 2)
            ours = grid[top : top + IMAGE_SIDE, left : left + IMAGE_SIDE]
            assert np.abs(ours - 255.0 * image).max() <= 1.5
        assert not grid[IMAGE_SIDE:, IMAGE_SIDE:].any()
    assert not np.array_equal(found["step-000000.png"], found["step-000003.png"])
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in board.Images("validation")] == [0, 2, 3]


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "text": "cache"}, {"mixed_precision": "bf16"}])
def test_drawing_changes_no_training(
    train: Train, prompts: Path, tmp_path: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"ema_decay": 0.5, "workers": 1, "cache": tmp_path / "cache", **options}
    made = 0
    make = AutoencoderKL.__init__

    @wraps(make)
    def count(self: AutoencoderKL, *args: object, **kwargs: object) -> None:
        nonlocal made
        made += 1
        make(self, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "__init__", count)
    without = train("without", **common)
    assert made == 0
    drawing = {"validation_prompts": prompts, "validation_every": 1, "validation_sampling_steps": 2}
    with_images = train("with", **common, **drawing)
    assert made == len(drawn(with_images)) == 5
    for ours, theirs in zip(metrics(with_images), metrics(without), strict=True):
        assert {k: v for k, v in ours.items() if k not in CLOCK} == {k: v for k, v in theirs.items() if k not in CLOCK}


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("\n \n", "has no prompt")])
def test_a_file_without_prompts_is_one_line(
    shards: Path,
    model: Path,
    tmp_path: Path,
    content: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", validation_prompts=file)) == 2
    error = capsys.readouterr().err.strip()
    assert f"--validation-prompts {file} {message}" in error
    assert error.count("\n") == 0


def test_overwriting_removes_the_images_of_another_run(train: Train, prompts: Path) -> None:
    out = train(validation_prompts=prompts, validation_sampling_steps=1, max_steps=2)
    assert len(drawn(out)) == 2
    train(max_steps=2, overwrite=True)
    assert not (out / "validation").exists()
    assert len(column(out, "loss")) == 2
