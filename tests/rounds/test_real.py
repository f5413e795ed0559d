"""Rounds on the embedded world: the results are those of the separate commands, also after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from smpo_pipeline.toy.create import ASSETS
from smpo_pipeline.toy.world import captions_of
from tests.command import run_command
from tests.forking import forking_python
from tests.rounds.helpers import ALL

pytestmark = pytest.mark.slow

MODEL, REWARD = ASSETS / "model", f"pickscore={ASSETS / 'rewards/pickscore'}"
SECONDS = 1500


def flags(ray_address: str) -> dict[str, dict[str, Any]]:
    on_ray = {"device": "cpu", "concurrency": 1, "ray_address": ray_address}
    few = {"sampler": "ddim", "steps": 3, "guidance_scale": 1}
    return {
        "generate": {**on_ray, **few, "images_per_prompt": 4, "prompts_per_file": 2},
        "score": {"device": "cpu", "ray_address": ray_address, "reward": REWARD},
        "select": {"by": "extremes"},
        "invert": {**on_ray, "steps": 3, "pairs_per_shard": 2},
        "train": {"beta": 300, "lr": 1e-4, "batch_size": 4, "max_steps": 4, "save_every": 1, "workers": 0},
    }


def write_rounds(folder: Path, ray_address: str, **more: Any) -> tuple[str, ...]:
    """Write prompts and config; returns the command but for its --out."""
    (folder / "prompts.txt").write_text("\n".join(captions_of("train")[:6]))
    config = {"base": str(MODEL), "prompts": str(folder / "prompts.txt"), "seed": 3} | flags(ray_address) | more
    (folder / "rounds.yaml").write_text(yaml.safe_dump(config))
    return ("smpo_pipeline", "rounds", "--config", str(folder / "rounds.yaml"))


def start(*command: object) -> subprocess.Popen[str]:
    """Start a module in a process group of its own, with all the processes that it starts."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def kill_when(begun: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 0) -> bool:
    """Kill the group so many seconds after a condition holds; returns whether it still ran."""
    deadline = time.monotonic() + SECONDS
    while not begun():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    ran = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return ran


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    return said


def weights(folder: Path) -> bytes:
    return (folder / "run/unet/diffusion_pytorch_model.safetensors").read_bytes()


def test_a_round_is_the_separate_commands(tmp_path, ray_address, here_on_ray):
    """Each stage is a forked process; the test below starts them as users do."""
    command, out = write_rounds(tmp_path, ray_address), tmp_path / "out"
    first = out / "round-000"
    done = run_command("smpo-pipeline", *command[1:], "--out", out, patch=f"sys.executable = {forking_python()!r}")
    assert done.returncode == 0, done.stderr
    assert [line.split()[5] for line in done.stdout.splitlines() if line.startswith("round 0 (")] == ALL
    assert f"next: smpo-pipeline evaluate --model base={MODEL} tuned={first}/run " in done.stdout

    def run(name: str, *inputs: object, to: str) -> Path:
        given = yaml.safe_load((out / "flags" / f"{name}.yaml").read_text())
        words = [word for key, value in given.items() if key != "ray_address" for word in (flag(key), value)]
        every = (*inputs, *words, "--out", tmp_path / to)
        jobs = here_on_ray if name in ("generate", "score", "invert") else run_command
        program = ("smpo-train",) if name == "train" else ("smpo-pipeline", name)
        done = jobs(*program, *every)
        assert done.returncode == 0, done.stderr
        return tmp_path / to

    candidates = run("generate", "--model", MODEL, "--prompts", tmp_path / "prompts.txt", "--seed", 3, to="candidates")
    scores = run("score", "--pairs", candidates, to="scores")
    selected = run("select", "--candidates", candidates, "--scores", scores, "--seed", 3, to="pairs")
    pairs = ("--pairs", selected / "pairs.parquet", "--scores", selected / "scores")
    shards = run("invert", *pairs, "--model", MODEL, "--seed", 3, to="shards")
    run("train", "--shards", shards, "--model", MODEL, "--seed", 3, to="run")
    assert (selected / "pairs.parquet").read_bytes() == (first / "pairs/pairs.parquet").read_bytes()
    tars = sorted(path.name for path in shards.glob("*.tar"))
    assert len(tars) == 3
    for name in tars:
        assert (shards / name).read_bytes() == (first / "shards" / name).read_bytes()
    assert weights(tmp_path) == weights(first)


def flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_rounds_killed_in_each_stage_end_with_the_same_weights(tmp_path, ray_address):
    command = write_rounds(tmp_path, ray_address, rounds=2, reference="previous")
    finish(start(*command, "--out", tmp_path / "whole"))
    metrics = (tmp_path / "whole/round-001/run/metrics.jsonl").read_text().splitlines()
    # The reference of round 1 is where its training begins; beta multiplies what float16 rounded.
    assert abs(json.loads(metrics[0])["rewards/margins"]) < 1e-4 < abs(json.loads(metrics[-1])["rewards/margins"])
    out, stream, killed = tmp_path / "out", random.Random(0), 0
    folders = {"generate": "candidates", "score": "scores", "select": "pairs", "invert": "shards", "train": "run"}
    for number in (0, 1):
        for name in ALL:
            begun = out / f"round-00{number}" / folders[name]
            killed += kill_when(begun.is_dir, start(*command, "--out", out), stream.uniform(0, 5))
    assert killed
    finish(start(*command, "--out", out))
    for number in (0, 1):
        folder = f"round-00{number}"
        assert weights(out / folder) == weights(tmp_path / "whole" / folder)
        pairs = "pairs/pairs.parquet"
        assert (out / folder / pairs).read_bytes() == (tmp_path / "whole" / folder / pairs).read_bytes()
