"""A run that is killed, stopped or started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from smpo_schemas.errors import UserError
from smpo_trainer.checkpoints import Checkpoint, Checkpoints, load_checkpoint
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, dying_after, run_cli

OPTIONS = {"max_steps": 5, "save_every": 1, "lora_rank": 2}
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(args: Sequence[str], launch: Sequence[str] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "smpo_trainer", *args],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def launch_two(args: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *TWO_PROCESSES, "-m", "smpo_trainer", *args],
        check=False,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=120,
    )


def wait_for_steps(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    path = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])  # in bf16 the reference is computed anew, once
def test_killed_and_continued_equals_uninterrupted(
    shards: Path, model: Path, tmp_path: Path, mixed_precision: str
) -> None:
    options = {"max_steps": 12, "save_every": 2, "lr_schedule": "cosine", "warmup_steps": 3, "workers": 2}
    options["mixed_precision"] = mixed_precision
    whole = start(arguments(shards, model, tmp_path / "whole", **options))
    assert whole.wait() == 0
    for steps in (3, 7):
        killed = start(arguments(shards, model, tmp_path / "killed", **options))
        wait_for_steps(tmp_path / "killed", steps, killed)
        killed.kill()
        killed.communicate()
    # What a kill leaves while a line is written, and while a checkpoint is.
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (tmp_path / "killed" / ".checkpoint-000099.tmp").mkdir()
    last = start(arguments(shards, model, tmp_path / "killed", **options))
    said, _ = last.communicate()
    assert last.returncode == 0
    assert "going on after step" in said
    assert column(tmp_path / "killed", "step") == list(range(1, 13))
    for name in ("loss", "grad_norm", "lr", "rewards/margins"):
        assert column(tmp_path / "killed", name) == column(tmp_path / "whole", name)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert ("computing the reference anew" in whole.communicate()[0]) == (mixed_precision == "bf16")
    assert not list((tmp_path / "killed").glob("*checkpoint*"))


@pytest.mark.slow
def test_two_processes_equal_one(shards: Path, model: Path, tmp_path: Path) -> None:
    options = {"max_steps": 3, "beta": 200, "lr": 1e-5, "save_every": 2}
    one = start(arguments(shards, model, tmp_path / "one", batch_size=4, **options))
    assert one.wait() == 0
    two = launch_two(arguments(shards, model, tmp_path / "two", batch_size=2, **options))
    assert two.returncode == 0, two.stderr
    for name in ("loss", "grad_norm", "rewards/margins"):
        np.testing.assert_allclose(column(tmp_path / "two", name), column(tmp_path / "one", name), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_say_a_mistake_once_and_end(shards: Path, model: Path, tmp_path: Path) -> None:
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
    # How the data are read does not matter.
    assert train("run", **OPTIONS, workers=1) == interrupted
    whole = train("whole", **OPTIONS)
    assert column(interrupted, "step") == [1, 2, 3, 4, 5]
    assert column(interrupted, "loss") == column(whole, "loss")


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
    assert "an unfinished run with other settings: beta (2000.0 -> 500.0), lr (0.0001 -> 0.001);" in error
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
    assert run_cli(monkeypatch, arguments(shards, model, out, max_steps=2)) == 2
    assert "max_steps (1 -> 2)" in capsys.readouterr().err


def test_checkpoint_holds_no_pickle_and_damage_is_named(interrupted: Path) -> None:
    path = interrupted / "checkpoint-000003"
    assert load_checkpoint(path).step == 3
    for damage in (b"\x80\x02nonsense", b""):
        (path / "optimizer.pt").write_bytes(damage)
        with pytest.raises(UserError, match="checkpoint-000003 cannot be read"):
            load_checkpoint(path)


@pytest.mark.parametrize("limit", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked_for(train: Train, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    kept: list[list[str]] = []
    save = Checkpoints.save

    def look(self: Checkpoints, checkpoint: Checkpoint) -> Path:
        path = save(self, checkpoint)
        kept.append(sorted(each.name for each in path.parent.glob("checkpoint-*")))
        return path

    monkeypatch.setattr(Checkpoints, "save", look)
    train(**OPTIONS, checkpoints_total_limit=limit)
    assert kept[-1] == [f"checkpoint-{step:06d}" for step in range(5 - limit, 5)]
