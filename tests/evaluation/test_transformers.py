"""PixArt-Sigma, Z-Image and Sana through the real command, against their stock diffusers pipelines."""

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
from smpo_pipeline.evaluation.results import read_results
from smpo_schemas.trained_model import LORA_FILE
from tests.command import assert_one_line, run_here
from tests.models.stock import load_stock
from tests.tiny_transformers import make_tiny_pixart, make_tiny_sana, make_tiny_z_image

PROMPTS = ("a Cat", "a dog and " * 60)
"""The second has more tokens than any of the models reads."""

STEPS = 2

WORLDS: dict[str, dict[str, Any]] = {
    "pixart-sigma": {"make": make_tiny_pixart, "side": 32, "sampler": "DDIM", "steps": 20, "guidance": 4.5},
    "z-image": {"make": make_tiny_z_image, "side": 256, "sampler": "Euler", "steps": 50, "guidance": 6.0},
    "sana": {"make": make_tiny_sana, "side": 32, "sampler": "Euler", "steps": 20, "guidance": 4.5},
}


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, and its outputs of smpo-train: all weights, and a LoRA where diffusers has one."""
    found = WORLDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base, other = found["make"](folder / "base"), found["make"](folder / "other", seed=1)
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
    return found | {"kind": request.param, "folder": folder, "base": base, "prompts": prompts}


def evaluate(world: dict[str, Any], capfd: pytest.CaptureFixture[str], out: Path, names: tuple[str, ...]) -> Any:
    flags = ["--model", *(f"{name}={world['folder'] / name}" for name in names), "--prompts", world["prompts"]]
    flags += ["--reward", "tests.evaluation.stubs:Brightness", "--images-per-prompt", 2, "--steps", STEPS]
    flags += ["--device", "cpu", "--out", out, "--resolution", world["side"], "--batch-size", 3]
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
    noise = image_noise(0, prompt.strip(), index, (4, side // 4, side // 4))[None]
    (image,) = stock.run([prompt.strip()], noise, world["guidance"], STEPS, "pil")
    return np.asarray(image, dtype=int)


def test_base_tuned_and_lora_are_drawn_as_by_hand(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the usual guidance, in batches of prompts of different lengths."""
    names = ("base", "full") if world["kind"] == "pixart-sigma" else ("base", "full", "lora")
    done = evaluate(world, capfd, tmp_path / "out", names)
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "out")
    assert results is not None
    assert (results.settings.sampler, results.settings.guidance_scale) == (world["sampler"], world["guidance"])
    images = {}
    for name in names:
        for number, prompt in enumerate(PROMPTS):
            path = tmp_path / "out" / "images" / name / f"{number:05d}-01.png"
            images[name] = np.asarray(Image.open(path), dtype=int)
            assert np.abs(images[name] - drawn_by_hand(world, name, prompt, 1)).max() <= 1
    assert all(np.abs(images["base"] - images[name]).max() > 1 for name in names[1:])


def test_the_usual_steps_and_guidance_are_the_default(world: dict[str, Any], tmp_path: Path) -> None:
    from smpo_pipeline.evaluation.evaluation import prepare_evaluation
    from smpo_pipeline.evaluation.options import EvaluateOptions

    options = EvaluateOptions.model_construct(
        model=(f"base={world['base']}",),
        prompts=world["prompts"],
        reward=("tests.evaluation.stubs:Brightness",),
        out=tmp_path,
    )
    settings = prepare_evaluation(options).settings
    assert (settings.steps, settings.guidance_scale) == (world["steps"], world["guidance"])


@pytest.mark.parametrize("world", ["pixart-sigma"], indirect=True)
def test_a_lora_of_pixart_is_one_line(world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = evaluate(world, capfd, tmp_path / "out", ("base", "lora"))
    assert_one_line(done, "--model lora=", "diffusers has no LoRA", "PixArtTransformer2DModel")
