"""Sudden rises of the model's error, on artificial records and in a run that diverges."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import cast

import pytest

from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.metrics import Record
from smpo_trainer.output.checkpoints import Checkpoint, Checkpoints
from smpo_trainer.safeguards.spikes import SPIKES_FILE, Spike, SpikeDetector, error_ratio
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, metrics, run_cli


def record(step: int, ratio: float | None) -> Record:
    """A step whose errors, 0.02 and 0.04 of the reference, are ``ratio`` times as large; None: not finite."""
    errors = {f"error/image_{i}": None if ratio is None else ratio * e for i, e in enumerate((0.02, 0.04))}
    changes = {
        f"error_minus_reference/image_{i}": None if ratio is None else (ratio - 1) * e
        for i, e in enumerate((0.02, 0.04))
    }
    return {"step": step, **errors, **changes}


def noticed(ratios: list[float | None], limit: float = 2.0) -> list[Spike]:
    detector = SpikeDetector(Path(), limit)
    found = [detector.check(record(step, ratio)) for step, ratio in enumerate(ratios, start=1)]
    return [spike for spike in found if spike]


def plain(ratios: list[float], limit: float) -> int | None:
    """The step at which the first spike is noticed."""
    for last in range(4, len(ratios) + 1):
        before = ratios[max(0, last - 23) : last - 3]
        if min(ratios[last - 3 : last]) > limit * statistics.median(before):
            return last
    return None


def test_the_ratio_by_hand() -> None:
    assert error_ratio(record(1, 1.5)) == pytest.approx(1.5, rel=1e-12)
    assert error_ratio(record(1, None)) is None
    assert error_ratio({"step": 1}) is None


DIVERGING = [1.0, 1.0, 1.88, 3.16, 4.89, 6.58, 9.8, 14.55, 13.14, 11.1]
"""Of a run of the embedded world with a learning rate 100 times too large."""


@pytest.mark.parametrize(
    ("ratios", "at"),
    [
        (DIVERGING, 6),
        ([1.2] * 30 + [3.0] * 5, 33),
        ([1.2] * 30 + [3.0, 3.0, 1.2, 3.0, 3.0], None),  # not three in a row
        ([1.2] * 30 + [2.4] * 5, None),  # not above the limit
        ([1 + 0.05 * step for step in range(100)], None),  # slowly up to six times
        ([3.0, 3.1, 2.9, 3.0, 3.0], None),  # from other weights than the reference
        ([1.0, 1.0, None, 5.0, None, 5.0, 5.0], 7),  # skipped steps tell nothing
    ],
)
def test_only_a_sudden_lasting_rise_is_a_spike(ratios: list[float | None], at: int | None) -> None:
    assert [spike.step for spike in noticed(ratios)] == ([at] if at else [])
    if None not in ratios:
        assert plain(ratios, 2.0) == at  # type: ignore[arg-type]


def test_a_resumed_detector_is_the_same(tmp_path: Path) -> None:
    whole, first = SpikeDetector(tmp_path, 2.0), SpikeDetector(tmp_path, 2.0)
    for step, ratio in enumerate(DIVERGING, start=1):
        found = whole.check(record(step, ratio))
        assert found == first.check(record(step, ratio))
        if found:
            whole.add(found)
            first.add(found)
        resumed = SpikeDetector(tmp_path, 2.0)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        first = resumed
    assert first.state_dict() == whole.state_dict()
    assert "from 1 to 6.58 times the reference's" in whole.spikes[0].describe()


class SavesNothing:
    """Stands for a policy."""

    def save(self, folder: Path, weights: object) -> None:
        """Write no file."""


@pytest.mark.parametrize("every", [3, 7, 20, 50])
def test_a_checkpoint_well_before_the_last_one_is_kept(tmp_path: Path, every: int) -> None:
    checkpoints, policy = Checkpoints(tmp_path, 2, reach=20), cast("Policy", SavesNothing())
    for step in range(0, 30 * every, every):
        checkpoints.save(Checkpoint(step, {}, {}, None, {}), policy)
        kept = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in tmp_path.iterdir())
        assert kept[-2:] == [each for each in (step - every, step) if each >= 0]
        assert len(kept) <= 4
        # From a spike at this step or later the run goes back 20 steps or more, but not to its beginning.
        assert step - 40 - every <= kept[0] <= max(0, step - 20)


DIVERGES = {"objective": "dpo", "beta": 20, "lr": 3e-2, "warmup_steps": 4, "max_steps": 12, "save_every": 3}


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / SPIKES_FILE).read_text().splitlines()]


def dying_at_the_first_rollback() -> object:
    save = Checkpoints.save

    def save_or_die(self: Checkpoints, checkpoint: Checkpoint, policy: Policy) -> Path:
        if checkpoint.optimizer["spikes"]["spikes"]:
            raise KeyboardInterrupt
        return save(self, checkpoint, policy)

    return save_or_die


@pytest.mark.slow
def test_a_diverging_run_stops_or_rolls_back(
    train: Train,
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", **DIVERGES, on_spike="stop")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error: spike at step" in error
    assert "--on-spike rollback" in error
    (spike,) = lines(tmp_path / "run")
    assert spike["rolled_back_to"] is None
    # The same run, allowed to go back: from its last checkpoint it meets the same spike.
    out = train("run", **DIVERGES, on_spike="rollback")
    assert column(out, "step") == list(range(1, 13))
    rollbacks = lines(out)
    assert [each["lr_factor"] for each in rollbacks] == [0.5**n for n in range(1, len(rollbacks) + 1)]
    last = rollbacks[-1]
    assert column(out, "lr")[-1] == pytest.approx(3e-2 * last["lr_factor"], rel=1e-9)
    assert any("rose from" in warning for warning in json.loads((out / "training.json").read_text())["warnings"])
    assert (error_ratio(metrics(out)[-1]) or 0) < spike["error_ratio"]


@pytest.mark.slow
def test_a_run_killed_while_it_rolls_back_ends_like_an_uninterrupted_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", **DIVERGES, on_spike="rollback")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_at_the_first_rollback())
        with pytest.raises((AssertionError, KeyboardInterrupt)):
            train("killed", **DIVERGES, on_spike="rollback")
    killed = train("killed", **DIVERGES, on_spike="rollback")
    assert lines(killed) == lines(whole)
    for name in ("step", "loss", "grad_norm", "lr"):
        assert column(killed, name) == column(whole, name)
