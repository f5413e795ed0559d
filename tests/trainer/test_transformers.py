"""Training PixArt-Sigma, Z-Image and Sana on shards that the inverter made, to what stock diffusers loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.utils import checkpoint as torch_checkpoint

from smpo_models.draws import gaussian, named_stream
from smpo_models.loading import load_family
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_pipeline.generation.generator import load_generator
from tests.models.stock import load_stock
from tests.tiny import IMAGE_SIDE, LATENT_SHAPE
from tests.tiny_transformers import make_tiny_pixart, make_tiny_sana, make_tiny_z_image
from tests.trainer.conftest import Train
from tests.trainer.helpers import column, invert_tiny, with_stored_text

PROMPTS = ("a Cat", "a dog and " * 60)
"""The second has more tokens than any of the models reads."""

MODELS: dict[str, Callable[..., Path]] = {
    "pixart-sigma": make_tiny_pixart,
    "z-image": make_tiny_z_image,
    "sana": make_tiny_sana,
}
SAMPLING = {"pixart-sigma": ("DDIM", 4.5), "z-image": ("Euler", 6.0), "sana": ("Euler", 4.5)}

COMMON = {"max_steps": 3, "batch_size": 4, "lr": 1e-3, "beta": 2000}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invert_tiny(model, tmp_path_factory.mktemp("shards") / "tiny")


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_the_first_loss_is_ln_2_and_the_pipeline_loads_the_result(
    train: Train, model: Path, shards: Path, options: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The stored reference errors are what the trainer's own forward finds; emptied prompts are among them."""
    targets = load_family(str(model), ()).lora_targets
    if options and not targets:
        with pytest.raises(AssertionError):
            train(on=shards, base=model, **COMMON, **options)
        error = capsys.readouterr().err
        assert f"--lora-rank 2: diffusers has no LoRA for the denoiser of --model {model} (pixart-sigma)" in error
        return
    out = train(on=shards, base=model, **COMMON, **options)
    assert column(out, "loss")[0] == pytest.approx(math.log(2), abs=2e-4)
    assert column(out, "loss")[-1] != column(out, "loss")[0]
    pipeline = DiffusionPipeline.from_pretrained(model)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    if options:
        pipeline.load_lora_weights(str(out))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        pipeline.transformer = type(pipeline.transformer).from_pretrained(out / "transformer")
    after = pipeline.transformer.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith(".to_q.weight") for name in moved)
    if options:
        layers = {name.removesuffix(".weight") for name in moved}
        assert all(name.endswith(targets) for name in layers)
    tuned = load_generator(*parse_models([f"tuned={out}"]), str(model), "cpu", "fp32").denoiser.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in tuned.items())


def test_stored_text_trains_as_the_text_encoders_do(train: Train, model: Path, shards: Path, tmp_path: Path) -> None:
    """Of a model whose texts differ in length; the prompts of the shards do, and some are emptied."""
    live = train("live", on=shards, base=model, **COMMON)
    stored = train("stored", on=with_stored_text(shards, model, tmp_path / "shards"), base=model, **COMMON)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(column(stored, name), column(live, name), rtol=1e-5)


def test_validation_images_are_those_of_the_stock_pipeline(
    train: Train, model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    out = train(on=shards, base=model, **COMMON | {"max_steps": 1}, image_prompts=prompts, image_sampling_steps=2)
    sampler, guidance = SAMPLING[model.name]
    assert f"2 prompts, 2 {sampler} steps, guidance scale {guidance:g}" in capsys.readouterr().out
    stock = load_stock(model)
    stock.shape = (IMAGE_SIDE, IMAGE_SIDE)
    grid = np.asarray(Image.open(out / "validation" / "step-000000.png"), dtype=float)
    for number, prompt in enumerate(PROMPTS):
        noise = gaussian(named_stream(f"validation\n0\n{number}"), LATENT_SHAPE)[None]
        (image,) = stock.run([prompt.strip()], noise, guidance, 2, "np")
        ours = grid[:, IMAGE_SIDE * number : IMAGE_SIDE * (number + 1)]
        assert np.abs(ours - 255 * image).max() <= 1.5


def test_gradient_checkpointing_changes_nothing_but_memory(
    train: Train, model: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, compute = [], torch_checkpoint.checkpoint
    monkeypatch.setattr(torch_checkpoint, "checkpoint", lambda *a, **k: (calls.append(1), compute(*a, **k))[1])
    common = {"on": shards, "base": model, **COMMON}
    stored = train("stored", **common)
    assert not calls
    recomputed = train("recomputed", gradient_checkpointing=True, **common)
    # Two blocks; of Z-Image, two more refine image and text.
    assert len(calls) == COMMON["max_steps"] * (4 if model.name == "z-image" else 2)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(column(recomputed, name), column(stored, name), rtol=1e-5)
