"""The newer families through the real command, against their stock diffusers pipelines; see test_flow.py, too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from smpo_models.draws import image_noise
from smpo_models.loading import load_family
from smpo_pipeline.evaluation.results import read_results
from smpo_schemas.trained_model import LORA_FILE
from tests.command import assert_one_line, run_here
from tests.models.stock import load_stock
from tests.tiny.families import FAMILIES

PROMPTS = ("a Cat", "a dog and " * 60)
"""The second has more tokens than any of the models reads."""

STEPS = 2

WITHOUT_LORA = "pixart-sigma"


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in ("sd35", "flux1-dev")])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, and its outputs of smpo-train: all weights, and a LoRA where diffusers has one."""
    folder, make = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    base, other = make(folder / "base"), make(folder / "other", seed=1)
    shutil.copytree(other / "transformer", folder / "full" / "transformer")
    stock = DiffusionPipeline.from_pretrained(base)
    generator, layers = torch.Generator().manual_seed(0), {}
    for name, module in stock.transformer.named_modules():
        if name.endswith(".to_q"):
            layers[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            layers[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    (folder / "lora").mkdir()
    save_file(layers, folder / "lora" / LORA_FILE)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    family = load_family(str(base), ())
    side = max(32, family.resolution_limits()[0])
    return {"kind": request.param, "folder": folder, "base": base, "prompts": prompts, "side": side, "family": family}


def evaluate(world: dict[str, Any], capfd: pytest.CaptureFixture[str], out: Path, names: tuple[str, ...]) -> Any:
    flags = ["--model", *(f"{name}={world['folder'] / name}" for name in names), "--prompts", world["prompts"]]
    flags += ["--reward", "tests.evaluation.stubs:Brightness", "--images-per-prompt", 1, "--steps", STEPS]
    flags += ["--device", "cpu", "--out", out, "--resolution", world["side"], "--batch-size", 3, "--sampler", "ddim"]
    return run_here(capfd, "smpo-pipeline", "evaluate", *flags)


def drawn_by_hand(world: dict[str, Any], name: str, prompt: str, index: int) -> np.ndarray:
    """Call diffusers' own pipeline on one image: uint8 [H, W, 3]."""
    stock, side = load_stock(world["base"]), world["side"]
    stock.shape = (side, side)
    if name == "full":
        kind = type(stock.pipeline.transformer)
        stock.pipeline.transformer = kind.from_pretrained(world["folder"] / "full" / "transformer")
    elif name == "lora":
        stock.pipeline.load_lora_weights(str(world["folder"] / "lora"))
    noise = image_noise(0, prompt.strip(), index, world["family"].latent_shape(side, side))[None]
    (image,) = stock.run([prompt.strip()], noise, world["family"].usual_guidance, STEPS, "pil")
    return np.asarray(image, dtype=int)


@pytest.mark.slow
def test_base_tuned_and_lora_are_drawn_as_by_hand(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the usual guidance, in batches of prompts of different lengths."""
    names = ("base", "full") if world["kind"] == WITHOUT_LORA else ("base", "full", "lora")
    done = evaluate(world, capfd, tmp_path / "out", names)
    assert done.returncode == 0, done.stderr
    results, sampler = read_results(tmp_path / "out"), "DDIM" if world["kind"] == WITHOUT_LORA else "Euler"
    assert results is not None
    assert (results.settings.sampler, results.settings.guidance_scale) == (sampler, world["family"].usual_guidance)
    images = {}
    for name in names:
        for number, prompt in enumerate(PROMPTS):
            path = tmp_path / "out" / "images" / name / f"{number:05d}-00.png"
            images[name] = np.asarray(Image.open(path), dtype=int)
            assert np.abs(images[name] - drawn_by_hand(world, name, prompt, 0)).max() <= 1
    assert all(np.abs(images["base"] - images[name]).max() > 1 for name in names[1:])


@pytest.mark.parametrize("world", [WITHOUT_LORA], indirect=True)
def test_a_lora_of_pixart_is_one_line(world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = evaluate(world, capfd, tmp_path / "out", ("base", "lora"))
    assert_one_line(done, "--model lora=", "diffusers has no LoRA", "PixArtTransformer2DModel")
