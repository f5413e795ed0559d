"""Later transformer families through ``invert``: what its output may not depend on, a kill in its middle included."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smpo_schemas.shards.reader import ShardDirectory
from tests.jobs.invert.test_text import PROMPTS, files, make_inputs
from tests.tiny.families import FAMILIES

pytestmark = pytest.mark.long

SIDES = {"qwen-image": 256, "z-image": 256, "flux2-klein": 128, "pixart-sigma": 32, "sana": 32, "lumina2": 32}
"""The smallest images of each family's tiny model, or nearly."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Ten pairs, in four shards; prompts of different lengths meet in a batch."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), [*PROMPTS, *PROMPTS])


@pytest.fixture(scope="module", params=SIDES)
def command(request, inputs, tmp_path_factory) -> Callable[..., tuple[object, ...]]:
    """Makes a command line of an output folder and further flags."""
    model = FAMILIES[request.param](tmp_path_factory.mktemp("model"))
    common = ("--pairs", inputs / "pairs.parquet", "--scores", inputs / "scores", "--model", model, "--device", "cpu")
    few = ("--resolution", SIDES[request.param], "--steps", 2, "--pairs-per-shard", 3)
    return lambda out, *more: ("invert", *common, *few, "--out", out, *more)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory, on_ray) -> Path:
    """By one worker, in batches of two trajectories."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = on_ray("smpo-pipeline", *command(out, "--batch-size", 2, "--concurrency", 1))
    assert done.returncode == 0, done.stderr
    assert {"shard-000003.tar", "index.parquet", "text/index.safetensors"} <= files(out).keys()
    return out


def test_two_workers_give_the_same_bytes(command, whole, tmp_path, here_on_ray):
    done = here_on_ray("smpo-pipeline", *command(tmp_path / "out", "--batch-size", 2, "--concurrency", 2))
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(whole)


def test_another_batch_size_gives_the_same_up_to_rounding(command, whole, tmp_path, here_on_ray):
    """Text is padded to the longest of other batches; what is stored of it is the same."""
    done = here_on_ray("smpo-pipeline", *command(tmp_path / "out", "--batch-size", 3, "--concurrency", 1))
    assert done.returncode == 0, done.stderr
    mine, theirs = files(tmp_path / "out"), files(whole)
    assert {name: each for name, each in mine.items() if name.startswith("text/")} == {
        name: each for name, each in theirs.items() if name.startswith("text/")
    }
    for sample, twin in zip(*(ShardDirectory(out).samples() for out in (tmp_path / "out", whole)), strict=True):
        assert sample.meta == twin.meta
        for name, tensor in sample.tensors().items():
            expected = twin.tensors()[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-3, atol=5e-4, equal_nan=True)


def test_a_killed_command_given_again_ends_at_the_same_bytes(command, whole, tmp_path, ray_address, here_on_ray):
    out = tmp_path / "out"
    arguments = command(out, "--batch-size", 2, "--concurrency", 1)
    code = "import sys; sys.argv[0] = 'smpo-pipeline'; from smpo_pipeline.cli import main; main()"
    words = [sys.executable, "-c", code, *map(str, arguments), "--ray-address", ray_address]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((out / ".units").glob("*.json")):
            time.sleep(0.01)
        process.kill()
    assert not (out / "manifest.json").exists()
    committed = [out / f"shard-{record.name.partition('-')[0]}.tar" for record in (out / ".units").glob("*.json")]
    written = {path: path.stat().st_mtime_ns for path in committed}
    assert written
    done = here_on_ray("smpo-pipeline", *arguments)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(whole)
    assert {path: path.stat().st_mtime_ns for path in written} == written
