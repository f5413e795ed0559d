"""Steps whose loss or gradient is not finite."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from smpo_models.fingerprint import fingerprint_module
from smpo_trainer import run
from smpo_trainer.data.order import Order
from smpo_trainer.output.checkpoints import Checkpoints
from smpo_trainer.settings import TrainSettings
from tests.tiny.stable_diffusion import make_tiny_unet
from tests.trainer.conftest import Train
from tests.trainer.helpers import PlainReference, arguments, collecting, column, dying_after, metrics, run_cli
from tests.trainer.objectives.test_objective_flags import write_scores

STEPS = 6
ORDER = Order((6, 6), seed=0, window=65536)  # two shards, two decided pairs each, three states per pair
BROKEN = "pair-0"


def steps_with(pair: str) -> list[int]:
    """The steps, from 1, with a state of this pair; steps have two states, and the pairs are 0, 1, 4, 5."""
    first = 3 * ["pair-0", "pair-1", "pair-4", "pair-5"].index(pair)
    own = range(first, first + 3)
    return [step + 1 for step in range(STEPS) if any(ORDER.state_at(2 * step + i) in own for i in (0, 1))]


def options(scores: Path) -> dict[str, object]:
    return {"objective": "dpo", "scores": scores, "weight_column": "trust", "max_steps": STEPS, "lr_schedule": "linear"}


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A weight beyond the range of float32 makes the loss of one pair infinite."""
    return write_scores(tmp_path / "scores", trust=[1e300, 1.0, 1.0, 1.0, 1.0, 1.0])


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()]


def test_a_broken_step_is_skipped_and_counted(train: Train, overflowing: Path) -> None:
    bad = steps_with(BROKEN)
    assert 0 < len(bad) < STEPS
    out = train(**options(overflowing))
    for number, record in enumerate(metrics(out), start=1):
        assert record["skipped_steps"] == sum(step <= number for step in bad)
        assert (record["grad_norm"] is None) == (number in bad)
        assert (record["loss"] is None) == (number in bad)
    assert [line["step"] for line in lines(out)] == bad
    assert all(set(line["bad_pairs"]) == {BROKEN} and len(line["pairs"]) == 2 for line in lines(out))
    # The learning rate falls with each step that is taken, and stays the same at the others.
    rates = column(out, "lr")
    assert all((rates[step] == rates[step - 1]) == (step in bad) for step in range(1, STEPS))


@pytest.mark.slow
def test_a_skipped_step_leaves_the_weights(
    train: Train, overflowing: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [dict(PlainReference(model).unet.named_parameters())]
    monkeypatch.setattr(Checkpoints, "save", collecting(seen))
    train(**options(overflowing), save_every=1)
    assert len(seen) == 1 + STEPS
    for step, (before, after) in enumerate(pairwise(seen), start=1):
        same = all(torch.equal(before[name], after[name]) for name in after)
        assert same == (step in steps_with(BROKEN))


def test_a_gradient_alone_can_be_broken(train: Train, tmp_path: Path) -> None:
    # beta/2 times a weight near the maximum of float32 overflows in the gradient, not in the loss.
    scores = write_scores(tmp_path / "scores", trust=[1e37, 1.0, 1.0, 1.0, 1.0, 1.0])
    out = train(**options(scores))
    assert [line["step"] for line in lines(out)] == steps_with(BROKEN)
    assert all(line["bad_pairs"] == [] for line in lines(out))


def test_too_many_in_a_row_end_the_run(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = make_tiny_unet()
    with torch.no_grad():
        unet.conv_in.weight.fill_(math.nan)
    unet.save_pretrained(tmp_path / "nan")
    for name, limits, steps in (("limit", {"max_skipped": 3, "max_steps": 9}, 3), ("short", {"max_steps": 2}, 2)):
        with pytest.raises(AssertionError):
            train(name, unet=tmp_path / "nan", **limits)
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0
        assert f"step {steps}: the loss is not finite for pair pair-" in error
        assert f"{steps} steps in a row" in error
        assert str(tmp_path / name / "nonfinite.jsonl") in error
        assert "--lr" in error
        assert len(lines(tmp_path / name)) == steps
        assert not (tmp_path / name / "unet").exists()


def test_a_step_that_is_taken_resets_the_count(train: Train, overflowing: Path) -> None:
    bad = steps_with(BROKEN)
    assert all(later - earlier > 1 for earlier, later in pairwise(bad))
    assert column(train(**options(overflowing), max_skipped=2), "skipped_steps")[-1] == len(bad) == 3


@pytest.mark.slow
def test_a_resumed_run_keeps_the_count(
    train: Train, overflowing: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {**options(overflowing), "save_every": 1, "ema_decay": 0.9}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(steps_with(BROKEN)[1]))
        with pytest.raises(AssertionError):
            train("killed", **run)
    # Lines that a killed run wrote after its last checkpoint are dropped.
    with (tmp_path / "killed" / "nonfinite.jsonl").open("a") as file:
        file.write('{"step": 99, "bad_pairs": [], "pairs": []}\n')
    killed, whole = train("killed", **run), train("whole", **run)
    for name in ("loss", "skipped_steps", "lr"):
        assert column(killed, name) == column(whole, name)
    assert lines(killed) == lines(whole)
    ours, theirs = (fingerprint_module(PlainReference(model, out / "unet").unet) for out in (killed, whole))
    assert ours == theirs


@pytest.mark.slow
def test_overwriting_removes_the_file(
    train: Train, overflowing: Path, shards: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(**options(overflowing))
    assert (out / "nonfinite.jsonl").is_file()
    assert run_cli(monkeypatch, arguments(shards, model, out, max_steps=1, overwrite=True)) == 0
    assert not (out / "nonfinite.jsonl").exists()


def test_with_a_scaler_a_broken_loss_is_not_an_overflow(
    train: Train, overflowing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gradient scaler, which accelerate only makes for fp16 on GPUs."""
    make = run.make_accelerator

    def with_scaler(settings: TrainSettings) -> Accelerator:
        accelerator, scaler = make(settings), torch.amp.GradScaler("cpu", init_scale=4.0)
        accelerator.scaler = scaler
        monkeypatch.setattr(
            accelerator, "unscale_gradients", lambda: scaler.unscale_(accelerator._optimizers[-1].optimizer)
        )
        return accelerator

    monkeypatch.setattr(run, "make_accelerator", with_scaler)
    out = train(**options(overflowing))
    assert [line["step"] for line in lines(out)] == steps_with(BROKEN)
    assert column(out, "skipped_steps")[-1] == len(steps_with(BROKEN))
