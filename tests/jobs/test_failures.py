"""What kills workers, fails on a device, fills the disk or goes wrong altogether: on Ray, through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smpo_schemas.rejects import read_rejects
from smpo_schemas.scores import read_scores, read_scores_info
from smpo_schemas.shards import ShardDirectory
from tests.command import assert_one_line, run_command
from tests.jobs.conftest import pair_rows
from tests.pictures import encode, picture
from tests.poison import CRASHES, write_poisonous_format
from tests.tiny import make_tiny_clip, make_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KILLER, FAILING = (encode(Image.new("RGB", (20, 20), colour), "PNG") for colour in ("#f00", "#0f0"))


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


def test_a_file_that_crashes_the_decoder_and_images_that_kill_a_reward_or_its_device(tmp_path):
    """Each costs its own pair; threads of the same worker that were at other chunks lose nothing."""
    pairs = write_pairs(
        tmp_path,
        150,
        {3: {"image_1": CRASHES}, 40: {"image_0": KILLER}, 41: {"image_1": FAILING}, 140: {"image_1": KILLER}},
    )
    site = write_poisonous_format(tmp_path / "site")
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
    assert sorted(reasons) == ["140", "3", "40", "41"]
    assert reasons["3"].startswith("crashed the decoder: it ended with SIGSEGV")
    assert reasons["41"].startswith("fails alone: RuntimeError: CUDA error: an illegal memory access")
    assert {reasons[pair].split(":")[0] for pair in ("40", "140")} == {"kills its worker"}
    table = read_scores(out, read_scores_info(out))
    assert table.num_rows == 146
    means = [np.asarray(Image.open(pa.BufferReader(data))).mean() for data in (encode(picture(seed=99)),)]
    np.testing.assert_allclose(table["touchy_1"].to_numpy(), means * 146, rtol=1e-6)


def test_pairs_that_kill_or_fail_the_model_are_left_out_and_the_others_are_as_without_them(tmp_path):
    model, reward = make_tiny_model(tmp_path / "model"), make_tiny_clip(tmp_path / "pickscore")
    whole = write_pairs(tmp_path, 8, {3: {"prompt": "kill"}, 5: {"prompt": "fail"}})
    common = ("--pairs", whole, "--device", "cpu")
    scores = tmp_path / "scores"
    done = run_command("smpo-pipeline", "score", *common, "--reward", f"pickscore={reward}", "--out", scores)
    assert done.returncode == 0, done.stderr
    command = ("invert", *common, "--scores", scores, "--model", model, "--steps", 2, "--batch-size", 4, "--out")
    code = "import sys; sys.argv[0] = 'smpo-pipeline'; from tests.poison import invert_touchily; invert_touchily()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command), tmp_path / "touchy"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": with_paths(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    rejects = {reject.pair_id: reject.reason for reject in read_rejects(tmp_path / "touchy" / "rejected.parquet")}
    assert rejects["3"].startswith("kills its worker: 3 died of it alone")
    assert rejects["5"].startswith("fails alone: RuntimeError: CUDA error: device-side assert")
    assert len(rejects) == 2
    kept = [sample.meta.pair_id for sample in ShardDirectory(tmp_path / "touchy").samples()]
    assert kept == ["0", "1", "2", "4", "6", "7"]
    totals = ShardDirectory(tmp_path / "touchy").manifest.totals
    assert (totals.pairs_in, totals.pairs, totals.rejected) == (8, 6, 2)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 KB and a way to make it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], check=False).returncode
    ):
        pytest.skip("may not mount a small disk here")
    yield disk, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_and_a_read_only_disk_are_one_line_and_the_same_command_goes_on(inputs, tmp_path, small_disk):
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
    command += ("--steps", 9, "--pairs-per-shard", 3)
    assert_one_line(run_command(*command), "cannot write", str(out), "No space left on device")
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))
    committed = {path: path.stat().st_ino for path in out.glob("shard-*.tar") if path.stat().st_size}
    remount("size=20m,ro")
    assert_one_line(run_command(*command), "cannot write", "Read-only file system")
    remount("rw")
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_ino for path in committed} == committed
    assert ShardDirectory(out).manifest.totals.pairs == len(list(ShardDirectory(out).samples())) == 15


def test_a_run_that_goes_wrong_stops_and_may_be_told_to_go_on(inputs, tmp_path):
    pairs = write_pairs(tmp_path, 150, {row: {"image_1": b"nonsense"} for row in range(0, 150, 10)})
    out = tmp_path / "out"
    command = ("smpo-pipeline", "score", "--pairs", pairs, "--reward", f"pickscore={inputs / 'pickscore'}")
    command += ("--out", out, "--device", "cpu")
    done = run_command(*command)
    assert_one_line(done, "stopped: 1", "--max-reject-rate 0.05", "image not readable", "a higher --max-reject-rate")
    assert not (out / "scores.json").exists()
    done = run_command(*command, "--max-reject-rate", 0.2)
    assert done.returncode == 0, done.stderr
    assert (read_scores_info(out).scored, read_scores_info(out).rejected) == (135, 15)
