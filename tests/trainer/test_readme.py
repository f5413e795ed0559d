"""The Python snippets of the README, run on the output of ``smpo-train``."""

from __future__ import annotations

import dataclasses
import re
import runpy
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from smpo_models.loading import load_family
from smpo_pipeline.inversion.inverter import Inverter
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import make_pair
from tests.tiny import IMAGE_SIDE, make_tiny_model, make_tiny_xl
from tests.trainer.conftest import Train
from tests.trainer.helpers import write_shards

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"

SNIPPETS = re.findall(r"(?:^    (?:import|from) .*\n)(?:(?:    .*)?\n)*", README, re.MULTILINE)
"""Indented blocks that begin with an import."""


@pytest.fixture(scope="module", params=[make_tiny_model, make_tiny_xl])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder in half precision, like most published ones, and its shards."""
    folder = tmp_path_factory.mktemp("stored")
    whole = DiffusionPipeline.from_pretrained(request.param(folder / "float32"), dtype=torch.float32)
    whole.to(torch.float16).save_pretrained(folder / "model")
    family = load_family(str(folder / "model"))
    inverter = Inverter(family, family.denoiser, InversionSettings(steps=3), seed=0)
    pairs = [dataclasses.replace(make_pair(number), scores={"taste": (0.1 * number, 0.3)}) for number in range(4)]
    samples, _ = inverter.invert([(pair, 0) for pair in pairs])
    (folder / "shards").mkdir()
    write_shards(folder / "shards", folder / "model", samples, ["taste"])
    return folder / "model", folder / "shards"


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_the_result_is_used_as_the_readme_says(
    train: Train, stored: tuple[Path, Path], tmp_path: Path, lora_rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shards = stored
    name = "runs/lora" if lora_rank else "runs/smpo"
    out = train(name, on=shards, base=model, lora_rank=lora_rank, max_steps=2, lr=1e-2)
    (code,) = [snippet for snippet in SNIPPETS if f'"{name}' in snippet]
    assert MODEL in code
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "snippet.py"
    script.write_text(textwrap.dedent(code).replace(MODEL, str(model)))
    runpy.run_path(str(script))
    (image,) = tmp_path.glob("*.png")
    assert np.asarray(Image.open(image)).shape == (IMAGE_SIDE, IMAGE_SIDE, 3)
    (whole,) = (path.parent for path in tmp_path.glob("*/model_index.json"))
    saved = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    base = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    if lora_rank:
        assert saved.keys() == base.keys()
        assert {"attn" in name for name in saved if not torch.equal(saved[name], base[name].float())} == {True}
    else:
        trained = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(saved[name], trained[name]) for name in trained)
