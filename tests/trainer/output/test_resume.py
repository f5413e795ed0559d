"""A run that is killed, stopped or started again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_trainer.model.policy import Policy
from smpo_trainer.output.checkpoints import Checkpoint, Checkpoints
from smpo_trainer.output.run_folder import OutputFolder
from smpo_trainer.trainer import Trainer
from tests.forking import forking_python
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, dying_after, run_cli

OPTIONS = {"max_steps": 5, "save_every": 1, "lora_rank": 2}
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(args: Sequence[str], launch: Sequence[str] = (), python: str = "") -> subprocess.Popen[str]:
    python = python or forking_python()
    return subprocess.Popen(
        [python, *launch, "-m", "smpo_trainer", *args],
        env={**ENVIRONMENT, "PYTHON_EXEC": python},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def launch_two(args: Sequence[str]) -> subprocess.CompletedProcess[str]:
    python = forking_python()
    return subprocess.run(
        [python, *TWO_PROCESSES, "-m", "smpo_trainer", *args],
        check=False,
        env={**ENVIRONMENT, "PYTHON_EXEC": python},
        text=True,
        capture_output=True,
        timeout=400,
    )


def wait_for_steps(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    path = out / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.long)]
)  # in bf16 the reference errors are recomputed
def test_killed_and_continued_equals_uninterrupted(shards: Path, model: Path, tmp_path: Path, dtype: str) -> None:
    options = {"max_steps": 12, "save_every": 2, "lr_schedule": "cosine", "warmup_steps": 3, "workers": 2}
    options["dtype"] = dtype
    whole = start(arguments(shards, model, tmp_path / "whole", **options))
    assert whole.wait() == 0
    for steps in (3, 7):
        killed = start(arguments(shards, model, tmp_path / "killed", **options))
        wait_for_steps(tmp_path / "killed", steps, killed)
        killed.kill()
        killed.communicate()
    # Leftovers of a kill while a line and while a checkpoint is written.
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (tmp_path / "killed" / ".checkpoint-000099.tmp").mkdir()
    last = start(arguments(shards, model, tmp_path / "killed", **options))
    said, _ = last.communicate()
    assert last.returncode == 0
    assert "resuming after step" in said
    assert column(tmp_path / "killed", "step") == list(range(1, 13))
    for name in ("loss", "grad_norm", "lr", "rewards/margins"):
        assert column(tmp_path / "killed", name) == column(tmp_path / "whole", name)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert ("recomputing the reference errors" in whole.communicate()[0]) == (dtype == "bf16")
    assert [path.name for path in (tmp_path / "killed").glob("*checkpoint*")] == ["checkpoint-000012"]


@pytest.mark.slow
def test_two_processes_equal_one(shards: Path, model: Path, tmp_path: Path) -> None:
    options = {"max_steps": 3, "beta": "auto:200", "lr": 1e-5, "save_every": 2}
    # A small weight of the norms: at the reference the hinge is at its corner, where rounding decides its slope.
    options |= {"robust": 0.1, "winner_preserving": 0, "norm_guard": 1e-4}
    one = start(arguments(shards, model, tmp_path / "one", batch_size=4, **options))
    assert one.wait() == 0
    two = launch_two(arguments(shards, model, tmp_path / "two", batch_size=2, **options))
    assert two.returncode == 0, two.stderr
    for name in (
        "loss",
        "grad_norm",
        "rewards/margins",
        "robust/loss",
        "robust/effective",
        "norm_guard/excess",
        "beta",
    ):
        np.testing.assert_allclose(column(tmp_path / "two", name), column(tmp_path / "one", name), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_print_an_error_once(shards: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    two = launch_two(arguments(shards, model, tmp_path / "file"))
    assert two.returncode != 0
    assert two.stderr.count("error: --out") == 1


@pytest.fixture
def interrupted(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA run of 5 steps that died right after the checkpoint of step 3."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(3))
        with pytest.raises(AssertionError):
            train("run", **OPTIONS)
    return tmp_path / "run"


def test_continued_run_equals_uninterrupted(train: Train, interrupted: Path) -> None:
    assert sorted(path.name for path in interrupted.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000003"]
    # The number of workers does not matter.
    assert train("run", **OPTIONS, workers=1) == interrupted
    whole = train("whole", **OPTIONS)
    assert column(interrupted, "step") == [1, 2, 3, 4, 5]
    assert column(interrupted, "loss") == column(whole, "loss")


def mapped() -> set[str]:
    """The checkpoint files that this process has memory-mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if "/checkpoint-" in line}


def test_a_checkpoint_is_mapped_and_released(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes of a machine share its pages; a later checkpoint removes the file."""
    options = {"max_steps": 3, "save_every": 2, "ema_decay": 0.9}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(2))
        with pytest.raises(AssertionError):
            train("run", **options)
    seen: dict[str, set[str]] = {}
    for name in ("restore", "train_step"):
        monkeypatch.setattr(Trainer, name, _noting(getattr(Trainer, name), seen))
    train("run", **options)
    assert {"optimizer.pt", "weights_in_training.safetensors"} < seen["restore"]
    assert seen["train_step"] == set()


def _noting(method: Callable[..., object], seen: dict[str, set[str]]) -> Callable[..., object]:
    def noted(self: Trainer, *given: object) -> object:
        seen[method.__name__] = mapped()
        return method(self, *given)

    return noted


def test_changed_settings_are_refused_by_name(
    interrupted: Path,
    shards: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    train: Train,
) -> None:
    changed = arguments(shards, model, interrupted, **{**OPTIONS, "beta": 500, "lr": 1e-3})
    assert run_cli(monkeypatch, changed) == 2
    error = capsys.readouterr().err
    assert (
        "an unfinished run with other settings (beta: 2000.0 there, 500.0 here; lr: 0.0001 there, 0.001 here);" in error
    )
    train("run", **OPTIONS, overwrite=True, beta=500)
    assert column(interrupted, "step") == [1, 2, 3, 4, 5]


def test_finished_run_is_left_alone(
    train: Train,
    shards: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = train(max_steps=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    train(max_steps=1)
    assert "finished; nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert run_cli(monkeypatch, arguments(shards, model, out, max_steps=1, beta=500)) == 2
    assert "a finished run with other settings (beta: 2000.0 there, 500.0 here);" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.8, "val_fraction": 0.3, "val_every": 4, "beta_decay": "2:6:0.5", "robust": 1}
        | {"winner_preserving": 0.1, "norm_guard": 1},
        {
            "lora_rank": 2,
            "dtype": "bf16",
            "batch_size": 1,
            "beta": "auto:300",
        },  # the reference errors are recomputed for more steps
    ],
)
def test_a_finished_run_with_more_steps_equals_one_of_that_length(train: Train, options: dict[str, object]) -> None:
    whole = train("whole", max_steps=7, **options)
    for steps in (3, 5, 7):
        out = train("run", max_steps=steps, **options)
    for name in ("step", "loss", "grad_norm", "lr", "rewards/margins", "skipped_steps"):
        assert column(out, name) == column(whole, name)
    file = "pytorch_lora_weights.safetensors" if "lora_rank" in options else "unet/diffusion_pytorch_model.safetensors"
    assert (out / file).read_bytes() == (whole / file).read_bytes()
    assert json.loads((out / "training.json").read_text())["steps"] == 7
    assert (out / "reference.safetensors").is_file() == ("dtype" in options)


def test_a_schedule_of_another_length_is_announced_and_followed(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train(lr_schedule="cosine", max_steps=2)
    capsys.readouterr()
    out = train(lr_schedule="cosine", max_steps=6)
    assert "--lr-schedule cosine" in capsys.readouterr().out
    rates = column(train("whole", lr_schedule="cosine", max_steps=6), "lr")
    assert column(out, "lr")[2:] == rates[2:]


def test_fewer_steps_than_finished_are_refused(
    train: Train, shards: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(max_steps=2)
    assert run_cli(monkeypatch, arguments(shards, model, out, max_steps=1)) == 2
    error = capsys.readouterr().err
    assert f"--out {out}" in error
    assert "2 steps" in error
    assert "--max-steps 1" in error
    shutil.rmtree(out / "checkpoint-000002")
    assert run_cli(monkeypatch, arguments(shards, model, out, max_steps=3)) == 2
    assert "--max-steps 3" in capsys.readouterr().err
    assert (out / "training.json").is_file()


def test_a_kill_before_the_run_is_finished_loses_no_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise UserError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "finish", die)
        with pytest.raises(AssertionError):
            train(max_steps=2)
    out = train(max_steps=2)
    summary = json.loads((out / "training.json").read_text())
    assert (summary["metrics"]["step"], summary["metrics"]["loss"]) == (2, column(out, "loss")[1])


@pytest.mark.parametrize("content", ["[]", "null", '{"version": 3, "step": 3}'])
def test_a_damaged_record_of_a_checkpoint_or_run_is_one_line(
    content: str,
    interrupted: Path,
    shards: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in ("checkpoint-000003/state.json", "training.json"):
        before = (interrupted / file).read_text() if (interrupted / file).exists() else None
        (interrupted / file).write_text(content)
        assert run_cli(monkeypatch, arguments(shards, model, interrupted, **OPTIONS)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(interrupted / Path(file).parts[0]) in error
        if before is not None:
            (interrupted / file).write_text(before)


def test_a_checkpoint_of_another_version_is_refused(
    interrupted: Path, shards: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = interrupted / "checkpoint-000003/state.json"
    state = json.loads(path.read_text())
    del state["version"]
    path.write_text(json.dumps(state))
    assert run_cli(monkeypatch, arguments(shards, model, interrupted, **OPTIONS)) == 2
    error = capsys.readouterr().err
    assert "checkpoint-000003" in error
    assert "--overwrite" in error


@pytest.mark.parametrize("file", ["optimizer.pt", "pytorch_lora_weights.safetensors"])
def test_checkpoint_holds_no_pickle_and_damage_is_named(
    interrupted: Path,
    file: str,
    shards: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for damage in (b"\x80\x02nonsense", b""):
        (interrupted / "checkpoint-000003" / file).write_bytes(damage)
        assert run_cli(monkeypatch, arguments(shards, model, interrupted, **OPTIONS)) == 2
        assert "checkpoint-000003 cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "on_spike", "steps"), [(1, "continue", [5]), (3, "continue", [3, 4, 5]), (1, "rollback", [0, 5])]
)
def test_the_number_of_checkpoints_is_limited(
    train: Train, monkeypatch: pytest.MonkeyPatch, limit: int, on_spike: str, steps: list[int]
) -> None:
    kept: list[list[str]] = []
    save = Checkpoints.save

    def look(self: Checkpoints, checkpoint: Checkpoint, policy: Policy) -> Path:
        path = save(self, checkpoint, policy)
        kept.append(sorted(folder.name for folder in path.parent.glob("checkpoint-*")))
        return path

    monkeypatch.setattr(Checkpoints, "save", look)
    train(**OPTIONS, checkpoints_total_limit=limit, on_spike=on_spike)
    assert kept[-1] == [f"checkpoint-{step:06d}" for step in steps]
