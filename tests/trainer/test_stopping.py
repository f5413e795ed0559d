"""Signals: a run that is asked to stop finishes its step and saves, whoever of its processes hears of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from smpo_trainer.stopping import StopRequest
from tests.trainer.helpers import arguments, column
from tests.trainer.test_resume import TWO_PROCESSES, start, wait_for_steps

LONG = {"max_steps": 500, "save_every": 1000}


def assert_saved(out: Path, said: str) -> None:
    last = column(out, "step")[-1]
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{last:06d}"]
    assert f"stopped after step {last} of 500; the same command goes on from here" in said
    assert not (out / "training.json").exists()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    deadline = time.monotonic() + 30
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


def test_only_a_second_ctrl_c_gives_up() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop.requested
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def to_one(process: subprocess.Popen[str]) -> None:
    """As Kubernetes does."""
    process.send_signal(signal.SIGTERM)


def ctrl_c(process: subprocess.Popen[str]) -> None:
    for each in family(process):
        each.send_signal(signal.SIGINT)


def to_all_twice(process: subprocess.Popen[str]) -> None:
    """As systemd and Slurm do: loaders first."""
    for _ in range(2):
        for each in reversed(family(process)):
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [to_one, ctrl_c, to_all_twice])
def test_a_signal_finishes_the_step_and_saves(
    shards: Path, model: Path, tmp_path: Path, stop: Callable[[subprocess.Popen[str]], None]
) -> None:
    process = start(arguments(shards, model, tmp_path / "run", workers=1, **LONG))
    wait_for_steps(tmp_path / "run", 2, process)
    everyone = family(process)
    stop(process)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert_saved(tmp_path / "run", said)
    assert_gone(everyone)


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_to_trainers_and_loaders(shards: Path, model: Path, tmp_path: Path) -> None:
    process = start(arguments(shards, model, tmp_path / "run", workers=1, **LONG), TWO_PROCESSES)
    wait_for_steps(tmp_path / "run", 2, process)
    everyone = family(process)
    assert len(everyone) >= 5
    process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=60)
    assert "DataLoader worker" not in error
    assert_saved(tmp_path / "run", said)
    assert_gone(everyone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["trainer", "loader"])
def test_loaders_do_not_outlive_a_trainer_that_dies(shards: Path, model: Path, tmp_path: Path, victim: str) -> None:
    process = start(arguments(shards, model, tmp_path / "run", workers=2, **LONG))
    wait_for_steps(tmp_path / "run", 2, process)
    everyone = family(process)
    assert len(everyone) >= 3
    everyone[0 if victim == "trainer" else 1].kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_gone(everyone)
