"""A run that is killed (-9) and resumed repeatedly leaves the same files as an uninterrupted one.

``make chaos`` kills twenty times; otherwise three.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.helpers import arguments, column, metrics
from tests.trainer.output import test_resume
from tests.trainer.output.test_resume import TWO_PROCESSES

start = partial(test_resume.start, python=sys.executable)  # a parent of all that it starts
KILLS = int(os.environ.get("SMPO_KILLS", "3"))
STEPS = 12 * KILLS
OF_THE_CLOCK = ("states_per_second", "data_wait_percent", "memory_gib")
DEADLINE_SECONDS = 400


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the process and all its children, like a machine that goes down."""
    parent = psutil.Process(process.pid)
    for member in (parent, *parent.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def same_numbers(out: Path, wanted: Path) -> None:
    """Compare all metrics but times, and check that each step is logged once, also in TensorBoard."""
    ours, theirs = metrics(out), metrics(wanted)
    assert [line["step"] for line in ours] == list(range(1, len(theirs) + 1))
    for record in (*ours, *theirs):
        for name in OF_THE_CLOCK:
            record.pop(name, None)
    assert ours == theirs
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, len(theirs) + 1))


@pytest.mark.long
def test_killed_at_random_moments_equals_uninterrupted(shards: Path, model: Path, tmp_path: Path) -> None:
    options = {
        "max_steps": STEPS, "save_every": 3, "lr_schedule": "cosine", "warmup_steps": 5, "workers": 1, "ema_decay": 0.9,
        "val_fraction": 0.3, "val_every": 4, "lr": 1e-5, "beta": 200,
    }  # fmt: skip
    whole = start(arguments(shards, model, tmp_path / "whole", **options))
    assert whole.wait() == 0, whole.communicate()
    out = tmp_path / "killed"
    stream = random.Random(20 * KILLS)
    # Moments to kill, in steps. If the resumed run is past it already, it is killed while starting.
    moments = sorted(stream.uniform(0, STEPS - 1) for _ in range(KILLS))
    for moment in moments:
        process = start(arguments(shards, model, out, **options))
        already = lines(out)
        if already > moment:
            time.sleep(stream.uniform(0, 5))
        else:
            wait_until(lambda moment=moment: lines(out) >= int(moment), process)
            time.sleep(moment % 1 * 0.05)
        assert process.poll() is None, "the run ended before it could be killed"
        kill(process)
    last = start(arguments(shards, model, out, **options))
    assert last.wait() == 0, last.communicate()
    same_numbers(out, tmp_path / "whole")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert not list(out.glob(".*"))


@pytest.mark.long
def test_killed_and_continued_with_other_numbers_of_processes(shards: Path, model: Path, tmp_path: Path) -> None:
    """1 -> 2 -> 1 processes, each killed: steps have the same states, so results differ by rounding only."""
    options = {"max_steps": 14, "save_every": 2, "beta": 200, "lr": 1e-5, "warmup_steps": 3, "workers": 0}
    whole = start(arguments(shards, model, tmp_path / "whole", batch_size=4, **options))
    assert whole.wait() == 0, whole.communicate()
    out = tmp_path / "killed"
    for launch, batch_size, kill_after in (((), 4, 5), (TWO_PROCESSES, 2, 10), ((), 4, None)):
        process = start(arguments(shards, model, out, batch_size=batch_size, **options), launch)
        if kill_after is None:
            assert process.wait() == 0, process.communicate()
        else:
            wait_until(lambda kill_after=kill_after: lines(out) >= kill_after, process)
            kill(process)
    assert column(out, "step") == list(range(1, 15))
    for name in ("loss", "grad_norm", "rewards/margins", "error/image_0"):
        np.testing.assert_allclose(column(out, name), column(tmp_path / "whole", name), rtol=1e-3, atol=1e-4)
    assert column(out, "lr") == column(tmp_path / "whole", "lr")
