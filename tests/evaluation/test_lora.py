from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.model_sources import parse_models
from smpo_pipeline.generation.generator import load_generator


@pytest.fixture
def lora(models: dict[str, Path], tmp_path: Path) -> Path:
    """Save LoRA weights that change the denoiser, as smpo-train does."""
    unet = UNet2DConditionModel.from_pretrained(models["base"], subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    return tmp_path / "lora"


def test_layers_that_do_not_fit_are_refused(models: dict[str, Path], lora: Path, tmp_path: Path) -> None:
    """diffusers would ignore them, and the base would be evaluated instead of the tuned model."""
    name = "pytorch_lora_weights.safetensors"
    layers = load_file(lora / name)
    (tmp_path / "bare").mkdir()
    save_file({key.removeprefix("unet."): value for key, value in layers.items()}, tmp_path / "bare" / name)
    (model,) = parse_models([f"lora={tmp_path / 'bare'}"])
    with pytest.raises(UserError, match="--model lora=.*bare.*first down_blocks"):
        load_generator(model, str(models["base"]), "cpu", "fp32")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_part_that_lacks_weights_is_refused(models: dict[str, Path], tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(models["base"], tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    whole = load_file(file)
    lacking = min(whole)
    save_file({key: value for key, value in whole.items() if key != lacking}, file, {"format": "pt"})
    (model,) = parse_models([f"base={folder}"])
    with pytest.raises(UserError, match="lacks 1 weights, first "):
        load_generator(model, None, "cpu", "fp32")


def test_lora_weights_are_fused_into_the_base(models: dict[str, Path], lora: Path) -> None:
    base, tuned = parse_models([f"base={models['base']}", f"lora={lora}"])
    assert tuned.kind == "lora"
    plain = load_generator(base, None, "cpu", "fp32")
    fused = load_generator(tuned, str(models["base"]), "cpu", "fp32")
    assert set(plain.denoiser.state_dict()) == set(fused.denoiser.state_dict())
    assert plain.fingerprint() != fused.fingerprint()
    noise, text, t = torch.randn(1, 4, 8, 8), torch.randn(1, 24, 32), torch.tensor([500])
    with torch.no_grad():
        outputs = [each.denoiser(noise, t, encoder_hidden_states=text).sample for each in (plain, fused)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
