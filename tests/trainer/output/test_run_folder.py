"""The output folder of a run: files, lock, and what a resumed run uses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import safetensors.torch
import torch

from smpo_common.errors import UserError
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.metrics import MetricsLog
from smpo_trainer.output.checkpoints import Checkpoint, Checkpoints
from smpo_trainer.output.run_folder import OutputFolder
from smpo_trainer.safeguards.spikes import SPIKES_FILE
from smpo_trainer.shards.fetch import ShardStore
from tests.command import assert_one_line, run_command
from tests.forking import forking_python
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, dying_after, run_cli
from tests.trainer.output.test_resume import ENVIRONMENT, OPTIONS, TWO_PROCESSES
from tests.trainer.safeguards.test_spikes import SavesNothing


@pytest.fixture
def cut(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run 5 steps in ``run`` that die right after the checkpoint of step 3."""

    def run(**options: object) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", dying_after(3))
            with pytest.raises(AssertionError):
                train("run", **OPTIONS, **options)
        return tmp_path / "run"

    return run


def test_files_of_a_run_without_checkpoint_are_ignored(train: Train, cut, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    safetensors.torch.save_file({"ref_error": torch.full((18, 2), 9.0)}, tmp_path / "run/reference.safetensors")
    (tmp_path / "run/nonfinite.jsonl").write_text('{"step": 1, "bad_pairs": [], "pairs": []}\n')
    cut()
    assert train("run", **OPTIONS) == tmp_path / "run"
    assert column(tmp_path / "run", "loss") == column(train("whole", **OPTIONS), "loss")
    assert not (tmp_path / "run/nonfinite.jsonl").exists()


def test_a_kill_while_a_run_finishes_leaves_no_files_behind(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "tidy", _die)
        with pytest.raises(AssertionError):
            train(**OPTIONS, dtype="bf16")
    out = train(**OPTIONS, dtype="bf16")
    assert (out / "training.json").is_file()
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-000005"]


HOLD = """
import fcntl, os, sys, time
from pathlib import Path
from smpo_common.run_lock import hold
with hold(Path(sys.argv[1]), fcntl.lockf):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_one_run_at_a_time_in_a_folder(
    train: Train, shards: Path, model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Held by another process, which is then killed while its forked child, like a loader, survives."""
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out, "100"], stdout=subprocess.PIPE, text=True)
    forked = int(holder.stdout.readline())
    try:
        for options in ({}, {"overwrite": True}):
            assert run_cli(monkeypatch, arguments(shards, model, out, **options)) == 2
            error = capsys.readouterr().err
            assert f"{out} is being written by another run (process {holder.pid} on " in error
            assert error.count("\n") == 1
        holder.kill()
        holder.wait()
        assert [path.name for path in out.iterdir()] == [".lock"]
        train(max_steps=1)
    finally:
        holder.kill()
        os.kill(forked, signal.SIGKILL)
    assert not list(out.glob(".*"))


def test_a_run_holds_its_folder(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    save = Checkpoints.save

    def save_and_ask(self: Checkpoints, checkpoint: Checkpoint, policy: Policy) -> Path:
        path = save(self, checkpoint, policy)
        asked = [sys.executable, "-c", HOLD, path.parent, "0"]
        refused.append(subprocess.run(asked, check=False, capture_output=True, text=True).stderr)
        return path

    monkeypatch.setattr(Checkpoints, "save", save_and_ask)
    train(max_steps=1)
    assert len(refused) == 1
    assert f"is being written by another run (process {os.getpid()} on " in refused[0]


def test_spikes_after_the_last_checkpoint_are_forgotten(train: Train, cut) -> None:
    (cut() / SPIKES_FILE).write_text('{"step": 4}\n')
    assert (train("run", **OPTIONS) / SPIKES_FILE).read_bytes() == b""


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b'{"step": 4, "lo\n', b"\0\0\0\0\n"])
def test_an_incomplete_last_line_is_dropped(train: Train, cut, tail: bytes) -> None:
    with (cut() / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert column(train("run", **OPTIONS), "step") == [1, 2, 3, 4, 5]


def test_lost_metrics_are_warned_of(train: Train, cut, capsys: pytest.CaptureFixture[str]) -> None:
    path = cut() / "metrics.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    train("run", **OPTIONS)
    assert "WARNING: metrics.jsonl holds 1 of the 3 finished steps" in capsys.readouterr().out


def test_metrics_are_synced_before_their_checkpoint(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, save = MetricsLog.sync, Checkpoints.save
    monkeypatch.setattr(MetricsLog, "sync", lambda *given: (events.append("sync"), sync(*given)))
    monkeypatch.setattr(Checkpoints, "save", lambda *given: (events.append("save"), save(*given)))
    train(**OPTIONS)
    assert events == ["sync", "save"] * 5


def test_initial_weights_are_compared_by_content_not_path(
    cut, train: Train, other_unet: Path, model: Path, shards: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    unet = Path(shutil.copytree(other_unet, tmp_path / "unet"))
    cut(unet=unet)
    shutil.rmtree(unet)
    shutil.copytree(model / "unet", unet)
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", **OPTIONS, unet=unet)) == 2
    assert "an unfinished run with other settings (unet" in capsys.readouterr().err
    train("run", **OPTIONS, unet=other_unet)


@pytest.mark.parametrize("options", [{}, {"max_skipped": 1, "lr": 1e30, "max_steps": 9}])
def test_fetching_ends_with_the_run(shards: Path, model: Path, tmp_path: Path, monkeypatch, options) -> None:
    closed: list[int] = []
    close = ShardStore.close
    monkeypatch.setattr(ShardStore, "close", lambda store: (closed.append(1), close(store)))
    status = run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", **options))
    assert (status, closed) == (2 if options else 0, [1])


def save_nothing(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(Checkpoint(step, {}, {}, None, {}), cast("Policy", SavesNothing()))


@pytest.mark.parametrize("remove", [lambda saved: saved.drop_after(1), lambda saved: save_nothing(saved, 2)])
def test_a_kill_while_a_checkpoint_is_removed_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remove: Callable[[Checkpoints], None]
) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2):
        save_nothing(checkpoints, step)

    def remove_a_part(path: Path, **_: object) -> None:
        if path.is_dir():
            (path / "optimizer.pt").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", remove_a_part)
        remove(checkpoints)
    assert all((folder / "optimizer.pt").is_file() for folder in tmp_path.glob("checkpoint-*"))
    checkpoints.drop_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_overwriting_removes_checkpoints_before_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = OutputFolder(tmp_path, 1, keep_checkpoints=False)
    save_nothing(output.checkpoints, 1)
    output.reference.touch()
    monkeypatch.setattr(OutputFolder, "_forget", _die)
    with pytest.raises(UserError):
        output.clear()
    assert output.checkpoints.latest() is None


def _die(*_: object) -> None:
    raise UserError("power cut")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [*(pytest.param(few, marks=pytest.mark.long) for few in (2_000, 20_000)), 100_000])
def test_a_full_disk_is_one_line(shards: Path, model: Path, tmp_path: Path, limit: int) -> None:
    """With a limit on file size, which metrics.jsonl, TensorBoard's file or a checkpoint reaches first."""
    args = arguments(shards, model, tmp_path / "run", save_every=1, max_steps=30)
    patch = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    done = run_command("smpo-train", *args, patch=patch)
    assert_one_line(done, "cannot write", str(tmp_path / "run"))


@pytest.mark.slow
def test_machines_that_do_not_share_the_folder_are_refused(cut, shards: Path, model: Path, tmp_path: Path) -> None:
    """Each process has its own folder, and only that of the main process has the checkpoint."""
    shutil.copytree(cut(), tmp_path / "0/run")
    (tmp_path / "1").mkdir()
    script = tmp_path / "apart.py"
    script.write_text("import os\nos.chdir(os.environ['RANK'])\nfrom smpo_trainer.cli import main\nmain()\n")
    args = arguments(shards, model, Path("run"), **OPTIONS, batch_size=1)
    python = forking_python()
    done = subprocess.run(
        [python, *TWO_PROCESSES, script, *args],
        env={**ENVIRONMENT, "PYTHON_EXEC": python},
        text=True,
        capture_output=True,
        check=False,
        cwd=tmp_path,
        timeout=400,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "process 1 " in said[0]
    assert "run/checkpoint-000003" in said[0]
    assert "all machines share" in said[0]
    assert json.loads((tmp_path / "0/run/checkpoint-000003/state.json").read_text())["step"] == 3
