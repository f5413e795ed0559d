"""``merge``: the negative model out of two tuned ones, denoiser folders and LoRAs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from tests.command import assert_one_line, run_here
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_unet, make_tiny_xl


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


def tuned(base: Path, out: Path, shift: float) -> Path:
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(shift)
    unet.save_pretrained(out / "unet")
    return out


def merge(capfd, base: Path, out: Path, positive: Path, negative: Path, *flags):
    given = ("--model", base, "--positive", positive, "--negative", negative, "--out", out)
    return run_here(capfd, "smpo-pipeline", "merge", *given, *flags)


@pytest.mark.slow
def test_the_merged_denoiser_is_the_base_plus_both_differences(base, tmp_path, capfd):
    models = tuned(base, tmp_path / "smpo", 0.5), tuned(base, tmp_path / "npo", 2.0)
    out = tmp_path / "merged"
    done = merge(capfd, base, out, *models, "--alpha", 0.5, "--beta", 0.25)
    assert done.returncode == 0, done.stderr
    assert f"--negative tuned={out}" in done.stdout.split("next:")[1]
    own = UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
    merged = load_family(str(base), ("denoiser",), denoiser=out).denoiser
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, own[name] + 0.75)
    record = json.loads((out / "merged.json").read_text())
    assert record["fingerprint"] == fingerprint_module(merged)
    assert (record["settings"]["alpha"], record["settings"]["beta"]) == ("0.5", "0.25")
    assert (out / "config.yaml").is_file()
    assert_one_line(merge(capfd, base, out, *models), f"--out {out}", "--overwrite")
    assert merge(capfd, base, out, *models, "--overwrite").returncode == 0


def test_a_lora_is_added_to_the_denoiser_that_it_was_trained_on(base, tmp_path, capfd):
    """W + (alpha / rank) B A of the attention's projections, with rank 2 and alpha 4; other weights to the bit."""
    start = tuned(base, tmp_path / "start", 0.5)
    unet = UNet2DConditionModel.from_pretrained(start, subfolder="unet")
    own = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
    )
    flags = ("--positive", tmp_path / "lora", "--unet", start, "--out", tmp_path / "out")
    done = run_here(capfd, "smpo-pipeline", "merge", "--model", base, *flags)
    assert done.returncode == 0, done.stderr
    assert f"tuned={tmp_path / 'out'} --prompts" in done.stdout
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet").state_dict()
    assert merged.keys() == own.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, own[name])}
    assert changed == {f"{name.rpartition('.lora')[0]}.weight" for name in layers}
    for name in changed:
        down, up = (layers[f"{name.removesuffix('.weight')}.lora.{way}.weight"].double() for way in ("down", "up"))
        torch.testing.assert_close(merged[name], (own[name].double() + 2 * up @ down).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [make_tiny_xl, None])
def test_models_that_do_not_fit_are_one_line(base, tmp_path, capfd, make):
    other = make(tmp_path / "other") if make else tmp_path / "other"
    if make is None:
        make_tiny_unet(time_embedding_dim=64).save_pretrained(other / "unet")
    done = merge(capfd, base, tmp_path / "merged", tuned(base, tmp_path / "smpo", 0.5), other)
    assert_one_line(done, str(other))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("out", "flags", "part"),
    [
        ("smpo", ("--overwrite",), "is also an input"),
        ("base", ("--overwrite",), "is also an input"),
        ("run", (), "unet"),
    ],
)
def test_denoisers_that_merge_did_not_write_are_kept(tmp_path, capfd, out, flags, part):
    for name in ("base", "smpo", "npo", "run"):
        (tmp_path / name / "unet").mkdir(parents=True)
    inputs = (tmp_path / name for name in ("base", out, "smpo", "npo"))
    assert_one_line(merge(capfd, *inputs, *flags), f"--out {tmp_path / out} ", part)
    assert (tmp_path / out / "unet").is_dir()
