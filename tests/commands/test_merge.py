"""``merge``: the negative model out of two tuned ones, denoiser folders and LoRAs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from tests.command import assert_one_line, run_here
from tests.tiny import make_tiny_model, make_tiny_unet, make_tiny_xl


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


@pytest.mark.parametrize("make", [make_tiny_xl, None])
def test_models_that_do_not_fit_are_one_line(base, tmp_path, capfd, make):
    other = make(tmp_path / "other") if make else tmp_path / "other"
    if make is None:
        make_tiny_unet(time_embedding_dim=64).save_pretrained(other / "unet")
    done = merge(capfd, base, tmp_path / "merged", tuned(base, tmp_path / "smpo", 0.5), other)
    assert_one_line(done, str(other))
    assert not (tmp_path / "merged").exists()
