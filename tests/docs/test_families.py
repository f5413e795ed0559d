"""The page of model families names every one of them, with the steps and the guidance that it is sampled at."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from smpo_models.loading import families, load_family
from tests.models.test_flow_families import MODELS
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_xl

PAGE = (Path(__file__).parents[2] / "docs/reference/families.md").read_text(encoding="utf-8")
_OTHERS = {"sd3-without-t5", "sd35-dynamic"}
KINDS = {"sd15": make_tiny_model, "sdxl": make_tiny_xl} | {
    name: make for name, make in MODELS.items() if name not in _OTHERS
}
TITLES = {
    "sd15": "Stable Diffusion 1.x, 2.x, SDXL", "sdxl": "Stable Diffusion 1.x, 2.x, SDXL", "sd3": "SD3", "sd35": "SD3.5",
    "pixart-sigma": "PixArt-Sigma", "flux1-dev": "FLUX.1-dev", "flux1-schnell": "FLUX.1-schnell",
    "flux2-klein": "FLUX.2-klein base", "qwen-image": "Qwen-Image", "z-image": "Z-Image", "sana": "Sana",
    "lumina2": "Lumina 2",
}  # fmt: skip


def test_every_pipeline_class_has_a_row():
    assert set(re.findall(r"`(\w+Pipeline)`", PAGE)) == set(families())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_guidance_are_the_familys(tmp_path, kind):
    family = load_family(str(KINDS[kind](tmp_path)), ())
    assert f"`{family.kind}`" in PAGE
    (row,) = re.findall(
        rf"^\| {re.escape(TITLES[kind])} \| (\d+) (\w+) \| (\w+(?:\.\d+)?).*\| (.*) \|$", PAGE, re.MULTILINE
    )
    steps, sampler, guidance, negative = row
    assert (int(steps), sampler) == (family.sampler_steps, family.samplers["ddim"])
    assert guidance == ("none" if family.usual_guidance is None else f"{family.usual_guidance:g}")
    assert (negative == "yes") == (family.guidance_calls != "never")
    assert ("diffusers has none" in PAGE.split(f"| {TITLES[kind]} | {steps}")[1].split("\n")[0]) == (
        not family.lora_targets
    )
