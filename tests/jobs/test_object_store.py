"""Stages 1 and 2 on an object store that fails now and then give the same bytes as on disk."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from smpo_common.store_path import AnyPath, StorePath
from smpo_pipeline.jobs.record.status import read_status
from smpo_schemas.manifest import read_manifest
from smpo_schemas.rejects import read_rejects
from tests.command import run_command, run_here
from tests.servers.object_store import Faults, object_store

pytestmark = pytest.mark.slow

BUCKET = StorePath("s3://bucket")


def score(inputs: Path, pairs: object, out: object) -> tuple[object, ...]:
    reward = f"pickscore={inputs / 'pickscore'}"
    return ("score", "--pairs", pairs, "--reward", reward, "--out", out, "--device", "cpu", "--batch-size", 5)


def invert(inputs: Path, pairs: object, scores: object, out: object) -> tuple[object, ...]:
    common = ("invert", "--pairs", pairs, "--scores", scores, "--model", inputs / "model", "--out", out)
    return (*common, "--device", "cpu", "--pairs-per-shard", 2, "--steps", 2, "--batch-size", 4, "--concurrency", 1)


def run(*arguments: object) -> None:
    done = run_command("smpo-pipeline", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def scores(inputs, tmp_path_factory, on_ray):
    """Scores on disk."""
    out = tmp_path_factory.mktemp("scores") / "out"
    done = on_ray("smpo-pipeline", *score(inputs, inputs / "pairs", out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def faults(inputs):
    """A store in its own process. Workers find it by environment variables, so its jobs start their own Ray."""
    with pytest.MonkeyPatch.context() as patch, object_store(patch.setenv) as faults:
        fsspec.filesystem("s3").put(str(inputs / "pairs"), "bucket/pairs", recursive=True)
        faults.every = 9
        yield faults


def assert_same(actual: AnyPath, expected: Path) -> None:
    """Compare byte by byte, except for files that name the pairs' location."""
    names = sorted(path.name for path in expected.iterdir())
    assert [path.name for path in actual.iterdir()] == names
    for name in names:
        if name == "rejected.parquet":
            without_source = [
                [
                    reject.model_copy(update={"source": Path(reject.source).name})
                    for reject in read_rejects(folder / name)
                ]
                for folder in (actual, expected)
            ]
            assert without_source[0] == without_source[1]
        elif name not in ("run.json", "config.yaml"):
            assert (actual / name).read_bytes() == (expected / name).read_bytes(), name


def test_scores_on_a_failing_store_equal_those_on_disk(inputs, scores, faults: Faults, capfd):
    out = BUCKET / "scores"
    run(*score(inputs, BUCKET / "pairs", out))
    assert set(faults.injected) == {"500", "503", "slow", "cut"}
    assert_same(out, scores)
    actual = read_status(out)
    assert (actual.job, actual.finished, actual.rewards, actual.rejected) == ("score", True, ["pickscore"], 3)
    written = (out / "scores.json").stat().st_mtime
    # A finished run is not changed.
    assert run_here(capfd, "smpo-pipeline", *score(inputs, BUCKET / "pairs", out)).returncode == 0
    assert (out / "scores.json").stat().st_mtime == written


@pytest.mark.long
def test_candidates_on_a_failing_store_equal_those_on_disk(inputs, faults: Faults, tmp_path, here_on_ray):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\ncat and dog")
    fsspec.filesystem("s3").put(str(tmp_path / "prompts.txt"), "bucket/prompts.txt")

    def generate(prompts: object, out: object) -> tuple[object, ...]:
        few = ("--images-per-prompt", 2, "--steps", 2, "--prompts-per-file", 2, "--keep", "latents")
        common = ("--model", inputs / "model", "--prompts", prompts, "--out", out, "--device", "cpu")
        return ("generate", *common, *few, "--concurrency", 1)

    done = here_on_ray("smpo-pipeline", *generate(tmp_path / "prompts.txt", tmp_path / "candidates"))
    assert done.returncode == 0, done.stderr
    run(*generate(BUCKET / "prompts.txt", BUCKET / "candidates"))
    assert_same(BUCKET / "candidates", tmp_path / "candidates")
    actual = read_status(BUCKET / "candidates")
    assert (actual.job, actual.finished, actual.units, actual.pairs_done) == ("generate", True, 2, 3)


@pytest.mark.long
def test_a_killed_invert_on_a_failing_store_is_resumed_to_the_same_bytes_as_on_disk(
    inputs, scores, faults: Faults, tmp_path, here_on_ray
):
    done = here_on_ray("smpo-pipeline", *invert(inputs, inputs / "pairs", scores, tmp_path / "shards"))
    assert done.returncode == 0, done.stderr
    fsspec.filesystem("s3").put(str(scores), "bucket/copied", recursive=True)
    out = BUCKET / "shards"
    command = invert(inputs, BUCKET / "pairs", BUCKET / "copied", out)
    code = "import sys; sys.argv[0] = 'smpo-pipeline'; from smpo_pipeline.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *map(str, command)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((out / ".units").glob("*.json")):
            time.sleep(0.05)
        process.kill()
    stopped = read_status(out)
    assert (stopped.job, stopped.finished, stopped.units, stopped.pairs_in) == ("invert", False, 8, 16)
    assert 1 <= stopped.units_done <= 8  # actors outlive the command for a moment
    assert stopped.pairs_done == 2 * stopped.units_done
    assert stopped.rate > 0
    assert stopped.holder == f"process {process.pid} on {socket.gethostname()}"
    run(*command)
    assert_same(out, tmp_path / "shards")
    finished = read_status(out)
    assert (finished.finished, finished.units_done, finished.rejected) == (True, 8, 3)
    assert finished.reasons == read_manifest(out).rejected_reasons
