"""The two runs of docs/guide/flow.md, on tiny random models: the training commands, their files, and the snippets."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.docs.snippets import commands
from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.trainer.helpers import invert_tiny, run_cli

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "flow.md"
GUIDE = PAGE.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
TRAINING = [arguments for _, program, arguments in commands(PAGE) if program == "train"]
MAKERS = {"sd35": make_tiny_sd3, "flux-lora": make_tiny_flux}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def value(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", TRAINING, ids=lambda arguments: value(arguments, "--out"))
def test_a_run_leaves_what_the_page_lists_and_is_used_as_it_says(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = value(arguments, "--out")
    monkeypatch.chdir(tmp_path)
    # Where diffusers looks before it asks the hub.
    base = Path(value(arguments, "--model"))
    MAKERS[name](base)
    invert_tiny(base, Path(value(arguments, "--shards")), reward=value(arguments, "--reward"))
    shortened = shlex.split("--max-steps 2 --grad-accum 1 --warmup-steps 0 --lr 1e-2 --workers 0")
    assert run_cli(monkeypatch, [*arguments, *shortened]) == 0

    (section,) = [part for part in GUIDE.split("\n## ") if f"--out {name}\n" in part]
    listed = re.findall(r"`([\w./-]+\.(?:json|jsonl|safetensors))`", section)
    assert len(listed) >= 3
    assert [file for file in listed if not ((tmp_path / name / file).is_file() or (tmp_path / file).is_file())] == []

    (code,) = [snippet for snippet in SNIPPETS if f'"{name}"' in snippet]
    script = tmp_path / "snippet.py"
    script.write_text(code)
    runpy.run_path(str(script))
    (image,) = tmp_path.glob("*.png")
    assert np.ptp(np.asarray(Image.open(image))) > 0
    (whole,) = (path.parent for path in tmp_path.glob("*-model/model_index.json"))
    before, after = load_file(base / WEIGHTS), load_file(whole / WEIGHTS)
    assert after.keys() == before.keys()
    moved = {weight for weight in before if not torch.equal(before[weight], after[weight])}
    if name == "sd35":
        trained = load_file(tmp_path / name / WEIGHTS)
        assert all(torch.equal(after[weight], trained[weight]) for weight in trained)
        assert any(".ff." in weight for weight in moved)
    else:
        assert moved
        assert all(".attn." in weight for weight in moved)


def test_every_training_run_and_snippet_is_run() -> None:
    assert sorted(value(arguments, "--out") for arguments in TRAINING) == sorted(MAKERS)
    assert len(SNIPPETS) == len(MAKERS)


def test_the_layers_that_a_lora_adapts(tmp_path: Path) -> None:
    """As the page says: not the second attention of SD3.5, and of FLUX.1 both kinds of blocks."""
    from smpo_models.loading import load_family
    from smpo_models.tuned.lora import add_lora

    for maker, also in ((make_tiny_sd3, "attn2"), (make_tiny_flux, "single_transformer_blocks")):
        family = load_family(str(maker(tmp_path / maker.__name__)), ("denoiser",))
        add_lora(family.denoiser, family.lora_targets, 2)
        adapted = {weight for weight, _ in family.denoiser.named_parameters() if "lora" in weight}
        assert all(".attn." in weight for weight in adapted)
        assert any(also in weight for weight in adapted) == (also != "attn2")
        assert any(also in weight for weight, _ in family.denoiser.named_parameters())
