"""What a run saves, and that stock diffusers takes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from smpo_models.fingerprint import fingerprint_module
from tests.trainer.conftest import Train
from tests.trainer.helpers import column


def picture(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, output_type="np", generator=generator).images


def test_trained_unet_generates_in_a_stock_pipeline(train: Train, model: Path) -> None:
    out = train(mixed_precision="no", max_steps=2)
    unet = UNet2DConditionModel.from_pretrained(out / "unet")
    assert unet.dtype == torch.float32
    assert fingerprint_module(unet) != fingerprint_module(UNet2DConditionModel.from_pretrained(model / "unet"))
    base = picture(StableDiffusionPipeline.from_pretrained(model))
    tuned = picture(StableDiffusionPipeline.from_pretrained(model, unet=unet))
    assert base.shape == tuned.shape
    assert not np.array_equal(base, tuned)
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_only_the_denoiser_changes_and_nothing_is_left_over(train: Train) -> None:
    out = train(max_steps=2, save_every=1)
    assert sorted(path.name for path in out.iterdir()) == [
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
