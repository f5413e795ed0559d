"""``--lora-format`` and ``--lora-alpha``: the stock pipeline draws the same picture from each file of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from smpo_models.loading import load_family
from smpo_models.tuned.lora import add_lora
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_pipeline.generation.generator import load_generator
from smpo_schemas.trained_model import LORA_FILE, lora_file
from smpo_trainer.model.policy import Policy
from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.tiny.qwen import make_tiny_klein, make_tiny_qwen_image
from tests.tiny.stable_diffusion import IMAGE_SIDE, make_tiny_model, make_tiny_xl
from tests.tiny.transformers import make_tiny_z_image
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, invert_tiny, run_cli

MODELS = {
    "sd15": (make_tiny_model, "kohya"),
    "sdxl": (make_tiny_xl, "comfyui"),
    "sd35": (make_tiny_sd3, "comfyui"),
    "flux1-dev": (make_tiny_flux, "comfyui"),
    "flux2-klein": (make_tiny_klein, "kohya"),
    "qwen": (make_tiny_qwen_image, "kohya"),
    "z-image": (make_tiny_z_image, "comfyui"),
}
"""How each is made, and a format."""

RANK, ALPHA = 3, 1.5


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param][0](tmp_path_factory.mktemp("models") / request.param)


def picture(base: Path, folder: Path | None, file: str = LORA_FILE) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """A picture by the stock pipeline, with the LoRA in a folder, and the denoiser's weights with the LoRA in them."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if folder:
        pipeline.load_lora_weights(folder, weight_name=file)
    image = draw(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    return image, {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}


def draw(pipeline: DiffusionPipeline, **options: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    options |= {"height": IMAGE_SIDE, "width": IMAGE_SIDE, "num_inference_steps": 2}
    return pipeline(prompt="a cat", output_type="np", generator=generator, **options).images[0]


@pytest.mark.slow
def test_each_file_is_the_policy_in_a_stock_pipeline(train: Train, base: Path, tmp_path: Path) -> None:
    """W + alpha / rank B A, with an alpha that is not the rank; of a run that was resumed."""
    shards = invert_tiny(base, tmp_path / "shards")
    lora_format = MODELS[base.name][1]
    options = {
        "on": shards,
        "base": base,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_format": lora_format,
        "beta": 2000,
    }
    train("lora", **options, max_steps=2, batch_size=4, lr=0.1)
    out = train("lora", **options, max_steps=3, batch_size=4, lr=0.1)
    assert column(out, "loss")[0] == pytest.approx(math.log(2), abs=2e-4)
    before, weights = picture(base, None)
    tensors = load_file(out / LORA_FILE)
    expected = dict(weights)
    for key, down in tensors.items():
        for a, b in ((".lora_A.", ".lora_B."), (".lora.down.", ".lora.up.")):
            if a in key:
                name = key.partition(".")[2].replace(a, ".")
                product = ALPHA / RANK * tensors[key.replace(a, b)].double() @ down.double()
                expected[name] = (weights[name].double() + product).float()
    # In SD3's last block the text's layers have no effect, and so no gradient.
    assert sum((expected[name] - weights[name]).abs().max() > 1e-3 for name in expected) > len(tensors) / 4
    first, _ = picture(base, out)
    assert np.abs(first - before).max() > 1e-3
    for folder in (out, out / "checkpoint-000003"):
        for file in (LORA_FILE, lora_file(lora_format)):
            image, fused = picture(base, folder, file)
            np.testing.assert_allclose(image, first, atol=1e-4)
            for name, tensor in expected.items():
                torch.testing.assert_close(fused[name], tensor, rtol=1e-4, atol=1e-5)
    tuned = load_generator(*parse_models([f"tuned={out}"]), str(base), "cpu", "fp32")
    for name, tensor in tuned.denoiser.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_files_of_flux1_are_the_policy_at_the_published_width(tmp_path: Path) -> None:
    """diffusers' reader of kohya's files takes the width for granted; a block of each kind, half a billion weights."""
    base = make_tiny_flux(tmp_path / "model")
    config = FluxTransformer2DModel.load_config(base, subfolder="transformer")
    published = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    denoiser, family = FluxTransformer2DModel.from_config(config | published), load_family(str(base), ())
    pipeline = DiffusionPipeline.from_pretrained(base, transformer=denoiser)
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline, max_sequence_length=16)
    add_lora(denoiser, family.lora_targets, RANK, ALPHA)
    policy = Policy(family, denoiser, None, starts_from_reference=True, lora_rank=RANK)
    trained = policy.trainable_parameters()
    for weights in trained.values():
        torch.nn.init.normal_(weights, std=0.1)
    expected = draw(pipeline, max_sequence_length=16)
    assert np.abs(expected - before).max() > 1e-2
    for lora_format in ("kohya", "comfyui"):
        replace(policy, lora_format=lora_format).save(tmp_path / lora_format, trained)
    denoiser.delete_adapters("default")
    for file in (LORA_FILE, lora_file("kohya"), lora_file("comfyui")):
        pipeline.load_lora_weights(tmp_path / ("comfyui" if "comfyui" in file else "kohya"), weight_name=file)
        np.testing.assert_allclose(draw(pipeline, max_sequence_length=16), expected, atol=1e-4)
        pipeline.unload_lora_weights()
        np.testing.assert_allclose(draw(pipeline, max_sequence_length=16), before, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"lora_format": "kohya", "lora_alpha": 4},
            "--lora-alpha, --lora-format: for an adapter; give --lora-rank too",
        ),
        ({"lora_format": "kohya", "lora_rank": 4}, "--lora-format kohya: there is none for the SD3Transformer2DModel"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options, words
) -> None:
    base = make_tiny_sd3(tmp_path / "model", t5=False)
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    args = arguments(tmp_path / "no-shards", base, tmp_path / "out", **options)
    assert run_cli(monkeypatch, args) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_another_alpha_is_another_run(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train("run", lora_rank=2, max_steps=1)
    train("run", lora_rank=2, max_steps=1, lora_alpha=2)
    with pytest.raises(AssertionError):
        train("run", lora_rank=2, max_steps=1, lora_alpha=1)
    assert "lora_alpha: None there, 1.0 here" in " ".join(capsys.readouterr().err.split())


def test_a_file_in_another_format_is_never_older_than_the_adapter(train: Train) -> None:
    kohya = lora_file("kohya")
    train("run", lora_rank=2, max_steps=1, lora_format="kohya")
    out = train("run", lora_rank=2, max_steps=2)
    assert not (out / kohya).exists()
    train("run", lora_rank=2, max_steps=2, lora_format="kohya")
    whole = train("whole", lora_rank=2, max_steps=2, lora_format="kohya")
    assert (out / kohya).read_bytes() == (whole / kohya).read_bytes()
