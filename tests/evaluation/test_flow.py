"""Flow models through the real command, against the stock diffusers pipelines called by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from smpo_models.draws import image_noise
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_pipeline.evaluation.results import read_results
from smpo_pipeline.generation.generator import load_generator
from smpo_schemas.trained_model import LORA_FILE
from tests.command import assert_one_line, run_command, run_here
from tests.models.stock import load_stock
from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.tiny.stable_diffusion import make_tiny_model

PROMPTS = ("a cat", "a dog and " * 40)
"""The second is cut: it has more tokens than schnell's T5 reads."""

REWARD = "tests.evaluation.stubs:Brightness"

WORLDS: dict[str, dict[str, Any]] = {
    "sd35": {"make": make_tiny_sd3, "side": 32, "guidance": 4.5},
    "flux1-dev": {"make": make_tiny_flux, "side": 256, "guidance": 3.5},
    "flux1-schnell": {"make": lambda path, seed=0: make_tiny_flux(path, seed, guided=False), "side": 256},
}


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model, and its outputs of smpo-train: all weights, a checkpoint of them, and a LoRA."""
    found = WORLDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base, other = found["make"](folder / "base"), found["make"](folder / "other", seed=1)
    for name in ("full", "full/checkpoint-000200"):
        shutil.copytree(other / "transformer", folder / name / "transformer")
    stock = DiffusionPipeline.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, module in stock.transformer.named_modules():
        if name.endswith("attn.to_q"):
            layers[f"{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            layers[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    type(stock).save_lora_weights(folder / "lora", transformer_lora_layers=layers, weight_name=LORA_FILE)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return found | {"kind": request.param, "folder": folder, "base": base, "prompts": prompts}


def evaluate(world: dict[str, Any], out: Path, *more: object) -> Any:
    folder = world["folder"]
    sources = [f"base={world['base']}", f"full={folder / 'full'}", f"lora={folder / 'lora'}"]
    flags = ["--model", *sources, f"step200={folder / 'full' / 'checkpoint-000200'}", "--prompts", world["prompts"]]
    flags += ["--reward", REWARD, "--images-per-prompt", 2, "--steps", 3, "--device", "cpu", "--out", out]
    flags += ["--resolution", world["side"]]
    return run_command("smpo-pipeline", "evaluate", *flags, *more)


def drawn_by_hand(world: dict[str, Any], name: str, index: int) -> list[np.ndarray]:
    """Call diffusers' own pipeline on one image of each prompt: uint8 [H, W, 3]."""
    stock = load_stock(world["base"])
    pipeline, side = stock.pipeline, world["side"]
    if name in ("full", "step200"):
        pipeline.transformer = type(pipeline.transformer).from_pretrained(world["folder"] / "full" / "transformer")
    elif name == "lora":
        pipeline.load_lora_weights(str(world["folder"] / "lora"))
    stock.shape = (side, side)
    images = []
    for prompt in PROMPTS:
        noise = image_noise(0, prompt.strip(), index, (4, side // 4, side // 4))[None]
        (image,) = stock.run([prompt.strip()], noise, world.get("guidance", 0.0), 3, "pil")
        images.append(np.asarray(image, dtype=int))
    return images


@pytest.mark.slow
def test_base_tuned_lora_and_checkpoint_are_drawn_as_by_hand(world: dict[str, Any], tmp_path: Path) -> None:
    outs = [tmp_path / "three", tmp_path / "one"] if world["kind"] == "flux1-dev" else [tmp_path / "three"]
    for out, batch_size in zip(outs, (3, 1), strict=False):
        done = evaluate(world, out, "--batch-size", batch_size)
        assert done.returncode == 0, done.stderr
    guidance = world.get("guidance")
    results = read_results(outs[0])
    assert results is not None
    assert (results.settings.sampler, results.settings.steps) == ("Euler", 3)
    assert results.settings.guidance_scale == guidance
    said = "3 Euler steps, " + (f"guidance scale {guidance:g}" if guidance else "no guidance scale")
    assert said in done.stdout
    assert said in (outs[0] / "report.html").read_text()
    fingerprints = {model.name: model.denoiser for model in results.models}
    assert fingerprints["full"] == fingerprints["step200"]
    assert len(set(fingerprints.values())) == 3
    images: dict[tuple[str, int], np.ndarray] = {}
    for name in fingerprints:
        for number, wanted in enumerate(drawn_by_hand(world, name, 1)):
            for out in outs:
                image = np.asarray(Image.open(out / "images" / name / f"{number:05d}-01.png"), dtype=int)
                # Float32 sums in another order may move a value over a rounding step of the PNG.
                assert np.abs(image - wanted).max() <= 1
            images[name, number] = image
    assert np.abs(images["base", 0] - images["full", 0]).max() > 1
    assert np.abs(images["base", 0] - images["lora", 0]).max() > 1
    again = evaluate(world, outs[0])
    assert "nothing to do" in again.stdout


@pytest.mark.slow
def test_what_a_flow_model_cannot_be_sampled_with_is_one_line(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: object, parts: tuple[str, ...]) -> None:
        flags = ["--prompts", world["prompts"], "--reward", REWARD, "--device", "cpu", "--out", tmp_path / "out"]
        assert_one_line(run_here(capfd, "smpo-pipeline", "evaluate", *flags, *more), *parts)
        assert not (tmp_path / "out").exists()

    base, folder = f"base={world['base']}", world["folder"]
    native = 32 if world["side"] == 32 else 2 * world["side"]
    refused("--model", base, "--resolution", native // 4, parts=(f"--resolution {native // 4}", f"{native} pixels"))
    side = native + 4
    refused("--model", base, "--resolution", side, parts=(f"--resolution {side}", "multiple of 8"))
    if world["kind"] == "flux1-schnell":
        refused("--model", base, "--guidance-scale", 3.5, parts=("--guidance-scale 3.5", "no guidance"))
    stable_diffusion = make_tiny_model(tmp_path / "sd")
    refused("--model", base, f"sd={stable_diffusion}", "--resolution", world["side"] * 2, parts=("--model", "sd15"))
    refused("--model", f"full={folder / 'full'}", "--base", stable_diffusion, parts=("full", "unet/config.json"))
    refused("--model", f"lora={folder / 'lora'}", "--base", stable_diffusion, parts=("--model lora=", "transformer"))
    stretched = shutil.copytree(world["base"], tmp_path / "stretched")
    config = stretched / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_terminal": 0.02}))
    refused("--model", f"base={stretched}", "--steps", 1, parts=("--steps 1", "two steps"))
    larger = shutil.copytree(folder / "full", tmp_path / "larger")
    config = larger / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    refused("--model", base, f"full={larger}", parts=("num_layers 3", "larger"))


def test_the_usual_steps_and_guidance_are_the_default(world: dict[str, Any], tmp_path: Path) -> None:
    from smpo_pipeline.evaluation.evaluation import prepare_evaluation
    from smpo_pipeline.evaluation.options import EvaluateOptions
    from smpo_pipeline.generation.suites import PromptSource

    options = EvaluateOptions.model_construct(
        model=(f"base={world['base']}",),
        prompts=PromptSource(None, world["prompts"]),
        reward=(REWARD,),
        out=tmp_path,
    )
    settings = prepare_evaluation(options).settings
    assert settings.steps == (4 if world["kind"] == "flux1-schnell" else world.get("steps", 28))
    assert settings.guidance_scale == world.get("guidance")


def test_a_tuned_model_is_cast_without_a_warning_of_layers_to_keep(world: dict[str, Any], monkeypatch) -> None:
    """Diffusers' own cast warns even where no layer is to be kept in float32."""
    warned: list[str] = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warned.append)
    (model,) = parse_models([f"full={world['folder'] / 'full'}"])
    generator = load_generator(model, str(world["base"]), "cpu", "bf16")
    assert {parameter.dtype for parameter in generator.denoiser.parameters()} == {torch.bfloat16}
    assert warned == []
