"""The files of a run, and loading them with stock diffusers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from smpo_models.fingerprint import fingerprint_module
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_schemas.trained_model import LORA_FILE, UNET_FOLDER
from tests.trainer.conftest import Train
from tests.trainer.helpers import column


def picture(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, output_type="np", generator=generator).images


@pytest.mark.slow
def test_trained_unet_generates_in_a_stock_pipeline(train: Train, model: Path) -> None:
    out = train(dtype="fp32", max_steps=2)
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    assert unet.dtype == torch.float32
    assert fingerprint_module(unet) != fingerprint_module(UNet2DConditionModel.from_pretrained(model / "unet"))
    base = picture(StableDiffusionPipeline.from_pretrained(model))
    tuned = picture(StableDiffusionPipeline.from_pretrained(model, unet=unet))
    assert base.shape == tuned.shape
    assert not np.array_equal(base, tuned)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_run_leaves_these_files_and_no_others(train: Train) -> None:
    out = train(max_steps=2, save_every=1)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "checkpoint-000002",
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "training.json",
        "unet",
    ]
    summary = json.loads((out / "training.json").read_text())
    assert summary["starts_from_reference"]
    assert summary["states"] == 18
    assert summary["metrics"]["step"] == 2
    assert summary["settings"]["beta"] == 2000


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}, {"lora_rank": 2, "ema_decay": 0.5}])
def test_a_checkpoint_equals_the_result_of_a_run_of_its_steps(
    train: Train, model: Path, options: dict[str, object]
) -> None:
    out = train(max_steps=3, save_every=1, checkpoints_total_limit=5, keep_checkpoints=True, **options)
    assert len(list(out.glob("checkpoint-*"))) == 3
    for steps in (2, 3):
        checkpoint, short = out / f"checkpoint-{steps:06d}", train(f"of {steps}", max_steps=steps, **options)
        assert [path.name for path in short.glob("checkpoint-*")] == [checkpoint.name]
        file = LORA_FILE if "lora_rank" in options else f"{UNET_FOLDER}/diffusion_pytorch_model.safetensors"
        assert (checkpoint / file).read_bytes() == (short / file).read_bytes()
        (source,) = parse_models([f"x={checkpoint}"])
        assert source.kind == ("lora" if "lora_rank" in options else "denoiser")
        # Only a checkpoint with an average holds the weights in training, too.
        assert len(list(checkpoint.rglob("*.safetensors"))) == (2 if "ema_decay" in options else 1)
    # A finished run is not changed, whatever these flags say.
    train(max_steps=3, save_every=1, **options)
    assert len(list(out.glob("checkpoint-*"))) == 3
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    if "lora_rank" in options:
        pipeline.load_lora_weights(out / "checkpoint-000002")
        assert pipeline.get_active_adapters()
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(out / "checkpoint-000002", subfolder="unet")


@pytest.mark.parametrize("options", [{"ema_decay": 0.5}, {"lora_rank": 2, "ema_decay": 0.5}])
def test_others_may_read_what_a_run_writes(train: Train, options: dict[str, object]) -> None:
    before = os.umask(0o022)
    try:
        out = train(max_steps=1, dtype="bf16", **options)
    finally:
        os.umask(before)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


@pytest.mark.slow
def test_lora_loads_into_a_stock_pipeline(train: Train, model: Path) -> None:
    out = train(lora_rank=4, lr=1e-3, max_steps=4)
    assert abs(column(out, "loss")[0] - np.log(2)) < 1e-4
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert weights
    assert all("lora" in name for name in weights)
    assert not (out / "unet").exists()
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    base = picture(pipeline)
    pipeline.load_lora_weights(out)
    assert pipeline.get_active_adapters()
    assert not np.array_equal(picture(pipeline), base)
