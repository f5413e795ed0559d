"""Optimizers, learning rate, moving average and gradient checkpointing, through the command line."""

from __future__ import annotations

import collections
import copy
import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.utils import checkpoint as torch_checkpoint

from smpo_trainer.model import optimizers
from smpo_trainer.output.checkpoints import Checkpoints
from tests.trainer.conftest import Train
from tests.trainer.helpers import PlainReference, arguments, collecting, column, dying_after, metrics, run_cli
from tests.trainer.output.test_resume import OPTIONS


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        name: value.detach() for name, value in UNet2DConditionModel.from_pretrained(out / "unet").named_parameters()
    }


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights in training at every checkpoint of the runs of a test."""
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(Checkpoints, "save", collecting(seen))
    return seen


@pytest.mark.slow
def test_adafactors_first_step_has_adams_signs_and_the_learning_rate_as_its_size(
    train: Train, model: Path, collected: list[dict[str, torch.Tensor]]
) -> None:
    train("adam", max_steps=1, lr=1e-4, weight_decay=0)
    train("ada", max_steps=1, lr=1e-4, weight_decay=0, optimizer="adafactor", max_grad_norm=0)
    before = dict(PlainReference(model).unet.named_parameters())
    name = "time_embedding.linear_1.weight"
    moved = (collected[1][name] - before[name]).double()
    # The first update is g / sqrt(row mean x column mean / mean) of g^2, clipped to an rms of 1, times lr
    # (arXiv 1804.04235): its sign is the gradient's, as in Adam's first step, and its rms at most lr.
    adam = (collected[0][name] - before[name]).double()
    assert moved.square().mean().sqrt() <= 1e-4 * (1 + 1e-3)
    clear = moved.abs() > 1e-6
    assert clear.double().mean() > 0.9
    assert torch.equal(moved.sign()[clear], adam.sign()[clear])


class AdamW8bit(torch.optim.Optimizer):
    """Replaces that of bitsandbytes, which needs a GPU; its state has the same names and types.

    Bytes with a scale for each tensor stand for its bytes with a scale for each block and a table of what they mean.
    """

    made: ClassVar[list[dict[str, float]]] = []

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        AdamW8bit.made.append({"lr": lr, "weight_decay": weight_decay})
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, _closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for n in (1, 2):
                        state[f"state{n}"] = torch.zeros_like(p, dtype=torch.uint8)
                        state[f"absmax{n}"] = torch.zeros(1)
                state["step"] += 1
                moments = []
                for n, beta, value in zip((1, 2), group["betas"], (p.grad, p.grad.square()), strict=True):
                    old = (state[f"state{n}"].float() / 255 * 2 - 1) * state[f"absmax{n}"]
                    new = beta * old + (1 - beta) * value
                    state[f"absmax{n}"] = new.abs().max().reshape(1)
                    scaled = new / state[f"absmax{n}"].clamp(min=1e-30)
                    state[f"state{n}"] = ((scaled + 1) / 2 * 255).round().to(torch.uint8)
                    moments.append(new / (1 - beta ** state["step"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * moments[0] / (moments[1].clamp(min=0).sqrt() + group["eps"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the bytes: torch would convert them to the dtype of the parameters."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        groups = [
            {**new, "params": old["params"]}
            for old, new in zip(self.param_groups, copy.deepcopy(state_dict["param_groups"]), strict=True)
        ]
        state = {parameters[number]: value for number, value in copy.deepcopy(state_dict["state"]).items()}
        self.__setstate__({"state": collections.defaultdict(dict, state), "param_groups": groups})


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of this name, for the CPU."""
    fake = types.ModuleType("bitsandbytes")
    fake.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setattr(optimizers, "_EIGHT_BIT", ("cpu",))
    AdamW8bit.made.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("bitsandbytes")
def test_eight_bit_adam_is_called_as_adam_and_makes_its_first_step(
    train: Train, collected: list[dict[str, torch.Tensor]]
) -> None:
    for optimizer in ("adamw8bit", "adamw"):
        train(optimizer, optimizer=optimizer, max_steps=1, lr=1e-4, weight_decay=0.02)
    assert AdamW8bit.made == [{"lr": 1e-4, "weight_decay": 0.02}]
    # The first step does not depend on how moments are stored.
    ours, theirs = collected
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw8bit"])
@pytest.mark.usefixtures("bitsandbytes")
def test_a_resumed_run_equals_the_uninterrupted_one(
    train: Train, optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path, model: Path
) -> None:
    run = {**OPTIONS, "lora_rank": None, "optimizer": optimizer, "ema_decay": 0.8}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(3))
        assert run_cli(patch, arguments(shards, model, tmp_path / "cut", **run)) == 2
    cut, whole = train("cut", **run), train("whole", **run)
    assert column(cut, "loss") == column(whole, "loss")
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_the_average_is_what_is_saved(train: Train, collected: list[dict[str, torch.Tensor]]) -> None:
    averaged = train("averaged", max_steps=5, save_every=1, ema_decay=0.3)
    average = collected[0]
    for n, step in enumerate(collected[1:], start=2):
        decay = min(0.3, n / (9 + n))
        average = {name: decay * average[name].double() + (1 - decay) * step[name].double() for name in step}
    ours = weights(averaged)
    for name, wanted in average.items():
        torch.testing.assert_close(ours[name].double(), wanted, rtol=1e-5, atol=1e-7)
    assert column(averaged, "loss") == column(train("plain", max_steps=5), "loss")


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    compute = torch_checkpoint.checkpoint

    def count(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return compute(*args, **kwargs)

    monkeypatch.setattr(torch_checkpoint, "checkpoint", count)
    stored = train("stored")
    assert calls == 0
    recomputed = train("recomputed", gradient_checkpointing=True)
    assert calls >= 4  # at least one block per step
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(column(recomputed, name), column(stored, name), rtol=1e-5)
    lora = train("lora", lora_rank=2, gradient_checkpointing=True)
    np.testing.assert_allclose(column(lora, "loss"), column(train("lora-kept", lora_rank=2), "loss"), rtol=1e-5)


@pytest.mark.slow
def test_the_learning_rate_is_scaled_as_published(train: Train, tmp_path: Path) -> None:
    out = train(lr=1e-8, scale_lr=True, batch_size=2, grad_accum=3, max_steps=2)
    assert column(out, "lr") == pytest.approx([6e-8, 6e-8])
    same = train("same", lr=6e-8, batch_size=2, grad_accum=3, max_steps=2)
    assert column(out, "loss") == column(same, "loss")
    assert json.loads((out / "training.json").read_text())["settings"]["lr"] == pytest.approx(6e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, *(0.5 * (1 + np.cos(np.pi * k / 4)) for k in range(4))]),
    ],
)
def test_schedules(train: Train, schedule: str, wanted: list[float]) -> None:
    out = train(max_steps=6, warmup_steps=2, lr=1e-5, lr_schedule=schedule)
    np.testing.assert_allclose(column(out, "lr"), 1e-5 * np.array(wanted), rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_lr": True, "lr": None}, "--scale-lr multiplies --lr"),
        ({"ema_decay": 1.5}, "--ema-decay"),
        ({"wandb_project": "p"}, "--wandb-project p needs wandb, which is not installed"),
        ({"optimizer": "adamw8bit"}, "--optimizer adamw8bit needs a GPU, the device is cpu"),
    ],
)
def test_wrong_flags(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", **options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("bitsandbytes")
def test_eight_bit_adam_needs_its_package(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", optimizer="adamw8bit")) == 2
    assert "--optimizer adamw8bit needs bitsandbytes, which is not installed" in capsys.readouterr().err


def test_each_setting_is_part_of_the_runs_identity(
    train: Train, shards: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(max_steps=1)
    for name, value, message in (
        ("optimizer", "adafactor", "optimizer: adamw there, adafactor here"),
        ("ema_decay", 0.9, "ema_decay: None there, 0.9 here"),
        ("scale_lr", True, "lr: 0.0001 there, 0.0002 here"),
    ):
        assert run_cli(monkeypatch, arguments(shards, model, out, max_steps=1, **{name: value})) == 2
        assert message in capsys.readouterr().err
    # Flags that do not change the results may change.
    train(max_steps=1, gradient_checkpointing=True, max_skipped=9)
    assert "finished; nothing to do" in capsys.readouterr().out


class _Run:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.slow
def test_wandb_gets_the_records_of_the_file(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module in place of wandb, which needs an account, that records its calls."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    runs: list[tuple[dict[str, object], _Run]] = []

    def init(**options: object) -> _Run:
        runs.append((options, _Run()))
        return runs[-1][1]

    fake = types.ModuleType("wandb")
    fake.init, fake.Error, fake.Image = init, RuntimeError, np.asarray
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = train(wandb_project="aligned", max_steps=2, image_prompts=prompts, image_sampling_steps=1)
    (options, run), *_ = runs
    assert (options["project"], options["name"], options["resume"]) == ("aligned", "run", "allow")
    assert options["config"]["beta"] == 2000
    assert run.finished
    lines = metrics(out)
    images = [(step, values["validation"]) for step, values in run.logged if "validation" in values]
    assert [step for step, _ in images] == [0, 2]
    for step, (image,) in images:
        assert np.array_equal(image, np.asarray(Image.open(out / "validation" / f"step-{step:06d}.png")))
    logged = [(step, values) for step, values in run.logged if "validation" not in values]
    assert [step for step, _ in logged] == [1, 2]
    for (_, values), line in zip(logged, lines, strict=True):
        assert values == {name: value for name, value in line.items() if value is not None and name != "step"}
    # A resumed run continues its wandb run; an overwritten one starts another.
    (out / "training.json").unlink()
    train(wandb_project="aligned", max_steps=2)
    train(wandb_project="aligned", max_steps=2, overwrite=True)
    first, second, third = (options["id"] for options, _ in runs)
    assert first == second != third
