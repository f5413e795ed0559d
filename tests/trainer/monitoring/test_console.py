"""The output of a run to a terminal or a pipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from smpo_trainer.monitoring.console import RunConsole
from tests.trainer.helpers import arguments, column
from tests.trainer.output.test_resume import start


def test_a_closed_pipe_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        console = RunConsole(is_main=True)
        for _ in range(2):
            console.say("hello")


@pytest.mark.slow
def test_a_run_continues_when_the_reader_of_its_output_exits(shards: Path, model: Path, tmp_path: Path) -> None:
    """`smpo-train ... | head -1`."""
    run = start(arguments(shards, model, tmp_path / "run"))
    run.stdout.readline()
    run.stdout.close()
    assert run.wait(120) == 0, run.stderr.read()
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4]
    assert (tmp_path / "run" / "training.json").is_file()
    assert not run.stderr.read()
