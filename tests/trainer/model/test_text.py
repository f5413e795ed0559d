"""``--text cache`` against ``--text live``."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import CLIPTextModel

from smpo_common.errors import UserError
from smpo_trainer.model.policy import Policy
from smpo_trainer.model.text import CachedText
from tests.trainer.conftest import Train
from tests.trainer.helpers import PROMPTS, arguments, column
from tests.trainer.output.test_resume import launch_two

NAMES = ("loss", "grad_norm", "val/loss", "error/image_0")
OPTIONS = {"val_fraction": 0.3, "val_every": 1, "beta": 200, "lr": 1e-5}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cached_equals_live_to_the_bit(train: Train, tmp_path: Path, dtype: str) -> None:
    options = {**OPTIONS, "dtype": dtype}
    live = train("live", **options)
    cached = train("cached", text="cache", cache=tmp_path / "cache", **options)
    for name in NAMES:
        assert column(cached, name) == column(live, name)
    (file,) = (tmp_path / "cache").glob("text-*.safetensors")
    tensors = safetensors.torch.load_file(file)
    assert tensors["text"].dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    # Each prompt once: the fourth one is dropped in its only trajectory, the first occurs twice.
    assert len(tensors["key"]) == len(tensors["text"]) == len(PROMPTS) - 1


def test_later_runs_use_the_file_and_the_encoders_are_freed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[weakref.ref] = []
    alive: list[bool] = []
    free = Policy.with_cached_text

    def watch(self: Policy, encoded: CachedText) -> Policy:
        encoders.append(weakref.ref(self.family.text_modules[0]))
        policy = free(self, encoded)
        del self
        gc.collect()
        alive.append(encoders[-1]() is not None)
        return policy

    monkeypatch.setattr(Policy, "with_cached_text", watch)
    first = train("first", text="cache", cache=tmp_path / "cache", max_steps=1)
    (file,) = (tmp_path / "cache").glob("text-*.safetensors")
    made = file.stat().st_mtime_ns

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a prompt was encoded")

    monkeypatch.setattr(CLIPTextModel, "forward", refuse)
    second = train("second", text="cache", cache=tmp_path / "cache", max_steps=1)
    assert column(first, "loss") == column(second, "loss")
    assert file.stat().st_mtime_ns == made
    assert alive == [False, False]


def test_a_damaged_file_and_a_missing_prompt_are_named(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(text="cache", cache=tmp_path / "cache", max_steps=1)
    (file,) = (tmp_path / "cache").glob("text-*.safetensors")
    cached = CachedText(file, torch.device("cpu"))
    assert cached([PROMPTS[1], "", PROMPTS[1]])["text"].shape[0] == 3
    with pytest.raises(UserError, match="lacks the prompt 'another'"):
        cached(["", "another"])
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read .* the next run makes it again"):
        CachedText(file, torch.device("cpu"))


@pytest.mark.long
def test_two_processes_share_a_file_and_one_draws(train: Train, shards: Path, model: Path, tmp_path: Path) -> None:
    gentle = {"max_steps": 2, "beta": 200, "lr": 1e-5}  # by default a step magnifies rounding
    one = train("one", batch_size=4, **gentle)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    options = {
        **gentle, "batch_size": 2, "text": "cache", "cache": tmp_path / "cache",
        "image_prompts": prompts, "image_sampling_steps": 2,
    }  # fmt: skip
    two = launch_two(arguments(shards, model, tmp_path / "two", **options))
    assert two.returncode == 0, two.stderr
    assert len(list((tmp_path / "cache").glob("text-*.safetensors"))) == 1
    assert len(list((tmp_path / "two" / "validation").glob("*.png"))) == 2
    assert column(tmp_path / "two", "loss") == pytest.approx(column(one, "loss"), rel=1e-3)
