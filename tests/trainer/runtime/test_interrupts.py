"""A signal to any process of a run makes it finish its step, save and exit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from smpo_trainer.monitoring.health import Health
from smpo_trainer.monitoring.metrics import Record
from smpo_trainer.runtime.interrupts import StopRequest
from tests.forking import forked
from tests.trainer.helpers import arguments, column, run_cli
from tests.trainer.output.test_resume import TWO_PROCESSES, start, wait_for_steps

LONG = {"max_steps": 500, "save_every": 1000}


def assert_saved(out: Path, said: str) -> None:
    last = column(out, "step")[-1]
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{last:06d}"]
    assert f"stopped after step {last} of 500; run the same command again to resume" in said
    assert not (out / "training.json").exists()


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """End what a failing test leaves."""
    before = forked()
    yield
    for process in forked():
        if process not in before:
            process.kill()


def start_and_list(
    args: Sequence[str], out: Path, launch: Sequence[str] = ()
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run after two steps, and its processes: the trainer, or launcher, first."""
    before = forked()
    process = start(args, launch)
    wait_for_steps(out, 2, process)
    return process, [each for each in forked() if each not in before]


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    deadline = time.monotonic() + 120
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


@pytest.fixture
def in_a_terminal() -> Iterator[None]:
    """Restore the default SIGINT handler: processes of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_a_terminal")
def test_only_a_second_ctrl_c_gives_up() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop.requested
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("in_a_terminal")
def test_a_stopped_run_has_its_own_status(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """``&&``, Slurm and Kubernetes tell a stopped run from a finished one by its status."""
    check = Health.check

    def check_and_signal(self: Health, record: Record) -> list[str]:
        if record["step"] == 2:
            os.kill(os.getpid(), number)
        return check(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Health, "check", check_and_signal)
        assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run")) == status
    assert column(tmp_path / "run", "step") == [1, 2]
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run")) == 0
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4]


def to_one(everyone: Sequence[psutil.Process]) -> int:
    """Send SIGTERM as Kubernetes does."""
    everyone[0].send_signal(signal.SIGTERM)
    return 143


def ctrl_c(everyone: Sequence[psutil.Process]) -> int:
    for member in everyone:
        member.send_signal(signal.SIGINT)
    return 130


def to_all_twice(everyone: Sequence[psutil.Process]) -> int:
    """Send SIGTERM as systemd and Slurm may do, to the loaders first."""
    for _ in range(2):
        for member in reversed(everyone):
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGTERM)
    return 143


@pytest.mark.slow
@pytest.mark.parametrize("stop", [to_one, pytest.param(ctrl_c, marks=pytest.mark.long), to_all_twice])
def test_a_signal_finishes_the_step_and_saves(
    shards: Path, model: Path, tmp_path: Path, stop: Callable[[Sequence[psutil.Process]], int]
) -> None:
    out = tmp_path / "run"
    process, everyone = start_and_list(arguments(shards, model, out, workers=1, **LONG), out)
    assert len(everyone) == 2
    status = stop(everyone)
    said, error = process.communicate(timeout=240)
    assert process.returncode == status, error
    assert_saved(out, said)
    assert_gone(everyone)


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_to_trainers_and_loaders(shards: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process, everyone = start_and_list(arguments(shards, model, out, workers=1, **LONG), out, TWO_PROCESSES)
    assert len(everyone) >= 5
    everyone[0].send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "DataLoader worker" not in error
    assert_saved(out, said)
    assert_gone(everyone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["trainer", "loader"])
def test_loaders_do_not_outlive_a_trainer_that_dies(shards: Path, model: Path, tmp_path: Path, victim: str) -> None:
    out = tmp_path / "run"
    process, everyone = start_and_list(arguments(shards, model, out, workers=2, **LONG), out)
    assert len(everyone) == 3
    everyone[0 if victim == "trainer" else 1].kill()
    process.communicate(timeout=240)
    assert process.returncode != 0
    assert_gone(everyone)
