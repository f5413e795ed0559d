"""The Python snippets of the README, run on the output of ``smpo-train``."""

from __future__ import annotations

import dataclasses
import re
import runpy
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
from tests.tiny.stable_diffusion import IMAGE_SIDE, make_tiny_model, make_tiny_xl
from tests.trainer.conftest import Train
from tests.trainer.helpers import run_cli, write_shards

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(LORA_COMMAND,) = re.findall(r"^    smpo-train (--config demo/tuned/config.yaml .*)$", README, re.MULTILINE)


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


@pytest.mark.slow
@pytest.mark.parametrize("result", ["tuned", "lora"])
def test_the_result_is_used_as_the_readme_says(
    train: Train, stored: tuple[Path, Path], tmp_path: Path, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shards = stored
    (tmp_path / "demo" / "world").mkdir(parents=True)
    (tmp_path / "demo" / "world" / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    out = train("demo/tuned", on=shards, base=model, max_steps=2, lr=1e-2)
    if result == "lora":
        assert run_cli(monkeypatch, LORA_COMMAND.split()) == 0
        out = tmp_path / "demo" / "lora"
    (code,) = [snippet for snippet in SNIPPETS if f'"demo/{result}"' in snippet]
    script = tmp_path / "snippet.py"
    script.write_text(code)
    runpy.run_path(str(script))
    (image,) = tmp_path.glob("*.png")
    assert np.asarray(Image.open(image)).shape == (IMAGE_SIDE, IMAGE_SIDE, 3)
    (whole,) = (path.parent for path in tmp_path.glob("*/model_index.json"))
    saved = load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")
    base = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    if result == "lora":
        assert saved.keys() == base.keys()
        assert {"attn" in name for name in saved if not torch.equal(saved[name], base[name].float())} == {True}
    else:
        trained = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(saved[name], trained[name]) for name in trained)


def test_every_snippet_is_run() -> None:
    assert len(SNIPPETS) == 2


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)|^\[\w+\]: ([^#\s]+)", README, re.MULTILINE)
    local = {first or second for first, second in targets if "://" not in first + second}
    assert len(local) > 10
    assert [target for target in local if not (ROOT / target).exists()] == []
