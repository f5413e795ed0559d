"""Crashing workers, failing devices, full disks and too many rejects, on Ray, through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.jobs.faults.crashes import REJECT_AFTER, RETRY_ONE_BY_ONE_AFTER
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.chunks import cut_chunks, pair_failures, pair_scores
from smpo_schemas.pairs import Pair
from smpo_schemas.rejects import read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from tests.command import assert_one_line, run_command
from tests.jobs.conftest import pair_rows
from tests.pictures import encode, picture
from tests.poison import CRASHES, write_poisoned_decoder
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FAILING = encode(Image.new("RGB", (20, 20), "#0f0"), "PNG")


def write_pairs(folder: Path, count: int, changed: dict[int, dict]) -> Path:
    rows = [
        {
            "pair_id": str(row),
            "prompt": "a cat",
            "image_0": encode(picture(seed=row)),
            "image_1": encode(picture(seed=99)),
        }
        for row in range(count)
    ]
    for row, change in changed.items():
        rows[row] |= change
    path = folder / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def with_paths(*paths: Path) -> str:
    """PYTHONPATH for the command and its workers."""
    return os.pathsep.join(map(str, [*paths, *(path for path in sys.path if path)]))


def test_a_crashing_file_and_a_failing_image_reject_only_their_own_pairs(tmp_path):
    pairs = write_pairs(tmp_path, 40, {3: {"image_1": CRASHES}, 30: {"image_1": FAILING}})
    site = write_poisoned_decoder(tmp_path / "site")
    out = tmp_path / "out"
    done = run_command(
        *(
            "smpo-pipeline",
            "score",
            "--pairs",
            pairs,
            "--reward",
            "tests.poison:Touchy",
            "--out",
            out,
            "--device",
            "cpu",
        ),
        PYTHONPATH=with_paths(site, ROOT),
    )
    assert done.returncode == 0, done.stderr
    reasons = {reject.pair_id: reject.reason for reject in read_rejects(out / "rejected.parquet")}
    assert sorted(reasons) == ["3", "30"]
    assert reasons["3"].startswith("crashed the decoder: it ended with SIGSEGV")
    assert reasons["30"].startswith("fails alone: RuntimeError: CUDA error: an illegal memory access")
    table = read_scores(out, read_scores_info(out))
    assert table["pair_id"].to_pylist() == [str(row) for row in range(40) if row not in {3, 30}]
    mean = np.asarray(decode_image(encode(picture(seed=99)))).mean()
    np.testing.assert_allclose(table["touchy_1"].to_numpy(), mean, rtol=1e-6)


@pytest.mark.parametrize("deaths", [1, RETRY_ONE_BY_ONE_AFTER])
def test_a_retried_chunk_is_scored_the_same_except_for_crashing_images(deaths):
    """Run an actor in this process, after ``deaths`` crashes of the chunk and then crashes of image 2 alone."""
    work_log = WorkLog()
    actor = RewardActor("tests.poison:Touchy", "0", "cpu", "fp32", 4, work_log, share=1, last=True)
    rows = [
        (f"f:{row}", Pair(str(row), "a cat", *(encode(picture(seed=9 * row + i)) for i in (0, 1)), None, None))
        for row in range(4)
    ]
    (chunk,) = cut_chunks(0, rows)
    whole = pair_scores(actor(chunk), "touchy")
    assert np.isfinite(whole).all()
    key = ("touchy", 0, 0)
    for _ in range(deaths):
        work_log.begin(key)
    for _ in range(REJECT_AFTER):
        work_log.begin((key, 2))
    again = actor(chunk)
    failures = pair_failures(again, "touchy")
    if deaths < RETRY_ONE_BY_ONE_AFTER:
        np.testing.assert_array_equal(pair_scores(again, "touchy"), whole)
        assert failures == [None] * 4
    else:
        assert failures[1].startswith("crashes its worker: ")
        assert [failures[pair] for pair in (0, 2, 3)] == [None] * 3
        np.testing.assert_array_equal(pair_scores(again, "touchy")[[0, 2, 3]], whole[[0, 2, 3]])
    assert work_log.crashes(key) == 0


ELSEWHERE = """
import numpy as np
import ray

from smpo_pipeline.rewards import Reward


class Elsewhere(Reward):
    name, unit = "elsewhere", "none"

    def __init__(self, model, device):
        self.model, self.fingerprint = "m", "1"
        if ray.is_initialized() and model == "raises":
            raise RuntimeError("no room for me\\nhere")
        if ray.is_initialized():
            self.fingerprint = "2"

    def score(self, images, prompts):
        return np.zeros(len(images))
"""


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("raises", ("ActorDiedError: RuntimeError: no room for me here;",)),
        ("other", ("--reward elsewhere:Elsewhere=other", "weights", "fingerprint 2", "(1)")),
    ],
)
def test_a_reward_that_fails_to_load_or_differs_on_a_worker_is_one_line(tmp_path, model, parts, on_ray):
    """With one try to load instead of five, which would take minutes."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    pairs = write_pairs(tmp_path, 2, {})
    command = ("score", "--pairs", pairs, "--out", tmp_path / "out", "--device", "cpu")
    command += ("--reward", f"elsewhere:Elsewhere={model}")
    patch = "from smpo_pipeline.jobs.cluster import session; session._DEATHS_LOADING = 0"
    done = on_ray("smpo-pipeline", *command, cwd=tmp_path, patch=patch)
    assert_one_line(done, *parts)
    assert not (tmp_path / "out" / "scores.json").exists()


@pytest.mark.long
def test_pairs_that_crash_or_fail_the_model_are_rejected_and_the_others_stored(tmp_path, on_ray, here_on_ray):
    model, reward = make_tiny_model(tmp_path / "model"), make_tiny_clip(tmp_path / "pickscore")
    whole = write_pairs(tmp_path, 8, {3: {"prompt": "kill"}, 5: {"prompt": "fail"}})
    common = ("--pairs", whole, "--device", "cpu")
    scores = tmp_path / "scores"
    done = here_on_ray("smpo-pipeline", "score", *common, "--reward", f"pickscore={reward}", "--out", scores)
    assert done.returncode == 0, done.stderr
    few = ("--steps", 2, "--batch-size", 4, "--concurrency", 1)
    command = ("invert", *common, "--scores", scores, "--model", model, *few, "--out")
    patch = "from tests.poison import TouchyInvertActor; from smpo_pipeline.jobs.invert import job; "
    patch += "job.InvertActor = TouchyInvertActor"
    done = on_ray("smpo-pipeline", *command, tmp_path / "touchy", cwd=ROOT, patch=patch)
    assert done.returncode == 0, done.stderr
    rejects = {reject.pair_id: reject.reason for reject in read_rejects(tmp_path / "touchy" / "rejected.parquet")}
    assert rejects["3"].startswith("crashes its worker: 1 workers died")
    assert rejects["5"].startswith("fails alone: RuntimeError: CUDA error: device-side assert")
    assert len(rejects) == 2
    stored = [sample.meta.pair_id for sample in ShardDirectory(tmp_path / "touchy").samples()]
    assert stored == ["0", "1", "2", "4", "6", "7"]
    totals = ShardDirectory(tmp_path / "touchy").manifest.totals
    assert (totals.pairs_in, totals.pairs, totals.rejected) == (8, 6, 2)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 KB, and a function to remount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], check=False).returncode
    ):
        pytest.skip("may not mount a small disk here")
    yield disk, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.long
def test_a_full_and_a_read_only_disk_are_one_line_and_the_same_command_resumes(inputs, tmp_path, small_disk):
    disk, remount = small_disk
    rows = [row | {"ranking_id": 100 * copy + row["ranking_id"]} for copy in range(5) for row in pair_rows()[3:6]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    common = ("--pairs", tmp_path / "pairs.parquet", "--device", "cpu")
    reward = f"pickscore={inputs / 'pickscore'}"
    scores = disk / "scores"
    done = run_command("smpo-pipeline", "score", *common, "--reward", reward, "--out", scores)
    assert done.returncode == 0, done.stderr
    out = disk / "shards"
    command = ("smpo-pipeline", "invert", *common, "--scores", scores, "--model", inputs / "model", "--out", out)
    command += ("--steps", 9, "--pairs-per-shard", 3, "--concurrency", 1)
    assert_one_line(run_command(*command), "cannot write", str(out), "No space left on device")
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))
    remount("size=20m")
    code = "import sys; sys.argv[0] = 'smpo-pipeline'; from smpo_pipeline.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, command[1:])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not list((out / ".units").glob("*.json")):
            time.sleep(0.01)
        # Mounted over itself: a disk with a file open for writing, here the lock, cannot be made read-only.
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        remount("bind,ro")
        stderr = process.communicate()[1]
    assert_one_line(
        subprocess.CompletedProcess(command, process.returncode, stderr=stderr), "cannot write", "Read-only file system"
    )
    subprocess.run(["umount", disk], check=True)
    committed = {path: path.stat().st_ino for path in out.glob("shard-*.tar") if path.stat().st_size}
    assert committed
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_ino for path in committed} == committed
    assert ShardDirectory(out).manifest.totals.pairs == len(list(ShardDirectory(out).samples())) == 15


def test_a_run_with_many_rejects_stops_and_resumes_with_a_higher_limit(inputs, tmp_path, here_on_ray):
    pairs = write_pairs(tmp_path, 150, {row: {"image_1": b"nonsense"} for row in range(0, 150, 10)})
    out = tmp_path / "out"
    command = ("smpo-pipeline", "score", "--pairs", pairs, "--reward", f"pickscore={inputs / 'pickscore'}")
    command += ("--out", out, "--device", "cpu")
    done = here_on_ray(*command)
    assert_one_line(
        done,
        "stopped: 1",
        "--max-reject-rate 0.05",
        "image not readable",
        "same command with a higher --max-reject-rate",
    )
    assert not (out / "scores.json").exists()
    done = here_on_ray(*command, "--max-reject-rate", 0.2)
    assert done.returncode == 0, done.stderr
    assert (read_scores_info(out).scored, read_scores_info(out).rejected) == (135, 15)
