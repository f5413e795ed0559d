"""Stages 1 and 2 through the command line, on Ray."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord, read_identity
from smpo_pipeline.rewards import load_reward
from smpo_schemas.pairs import image_id
from smpo_schemas.rejects import read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from tests.command import assert_one_line, run_command, run_here
from tests.jobs.conftest import REJECTED_IDS, pair_rows
from tests.jobs.helpers import invert, score
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_xl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scores(inputs, tmp_path_factory, on_ray):
    out = tmp_path_factory.mktemp("scores") / "out"
    done = score(inputs, out, "--batch-size", 5, run=on_ray)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


@pytest.fixture(scope="module")
def shards(inputs, scores, tmp_path_factory, on_ray):
    out = tmp_path_factory.mktemp("shards") / "out"
    done = invert(inputs, scores, out, "--batch-size", 4, run=on_ray)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


def test_every_row_is_scored_or_rejected_with_a_reason(inputs, scores):
    info = read_scores_info(scores)
    rows = pair_rows()
    rejects = read_rejects(scores / "rejected.parquet")
    assert (info.scored, info.rejected) == (len(rows) - 3, 3)
    assert {reject.pair_id for reject in rejects} == {*REJECTED_IDS, "1015"}
    assert [reject.kind for reject in rejects] == [*["image not readable"] * 2, "no image"]
    assert rejects[2].source.endswith("part-1.parquet:6")
    table = read_scores(scores, info).to_pylist()
    scored_rows = [row for row in rows if str(row["ranking_id"]) not in REJECTED_IDS and row["jpg_1"]]
    assert [row["pair_id"] for row in table] == [str(row["ranking_id"]) for row in scored_rows]
    for name in ("pickscore", "clipscore"):
        reward = load_reward(f"{name}={inputs / name}", "cpu")
        for stored, row in zip(table, scored_rows, strict=True):
            pictures = [decode_image(row[f"jpg_{index}"]) for index in range(2)]
            expected = reward.score(pictures, [row["caption"]] * 2)
            np.testing.assert_allclose([stored[f"{name}_0"], stored[f"{name}_1"]], expected, atol=1e-5)
            assert (stored["label"], stored["annotator"]) == (row["label_0"], str(row["user_id"]))
            assert [stored[f"image_{i}_id"] for i in (0, 1)] == [image_id(row[f"jpg_{i}"]) for i in (0, 1)]
        images = np.array([[row[f"{name}_0"], row[f"{name}_1"]] for row in table])
        statistics = info.rewards[name]
        assert (statistics.min, statistics.max) == (images.min(), images.max())
        assert statistics.mean == pytest.approx(images.mean(), rel=1e-6)
        assert statistics.fingerprint == reward.fingerprint


def test_adding_a_reward_equals_scoring_both_together(inputs, scores, tmp_path, capfd, here_on_ray):
    """Byte by byte, with another number of workers; inputs that do not match the table are refused."""
    out = tmp_path / "out"
    common = ("--pairs", inputs / "pairs", "--device", "cpu", "--batch-size", 5, "--out", out)
    pickscore, clipscore = (f"{name}={inputs / name}" for name in ("pickscore", "clipscore"))
    assert here_on_ray("smpo-pipeline", "score", *common, "--reward", pickscore).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    run = partial(run_here, capfd, "smpo-pipeline", "score", *common)
    other = make_tiny_clip(tmp_path / "other", seed=7)
    assert_one_line(run("--reward", f"pickscore={other}"), "scores of pickscore", str(other), "--overwrite")
    assert_one_line(run("--reward", clipscore, "--limit", 3), "finished run", "input.limit")
    assert_one_line(run("--reward", clipscore, "--concurrency", "x=2"), "--concurrency x=2", "NAME=N")
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    done = here_on_ray("smpo-pipeline", "score", *common, "--reward", clipscore, "--concurrency", "clipscore=2")
    assert done.returncode == 0, done.stderr
    assert read_scores_info(out) == read_scores_info(scores)
    names = [part.name for part in read_scores_info(out).parts]
    for name in (*names, "rejected.parquet"):
        assert (out / name).read_bytes() == (scores / name).read_bytes()
    left = {*names, "rejected.parquet", "scores.json", "run.json", "config.yaml"}
    assert {path.name for path in out.iterdir()} == left
    # All requested rewards are in the table.
    assert run("--reward", pickscore).returncode == 0
    assert {path.name for path in out.iterdir()} == left


@pytest.mark.long
def test_a_killed_score_is_resumed_and_gives_the_same(inputs, tmp_path, here_on_ray):
    """Kill the process in the middle of units; then run the same command with another concurrency."""
    rows = [row | {"ranking_id": 10_000 * copy + row["ranking_id"]} for copy in range(30) for row in pair_rows()[:12]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=50)
    outs = [tmp_path / name for name in ("killed", "whole")]
    common = ("--pairs", tmp_path / "pairs.parquet", "--reward", f"pickscore={inputs / 'pickscore'}", "--device", "cpu")
    common += ("--max-reject-rate", 0.5)
    code = "import sys; sys.argv[0] = 'smpo-pipeline'; from smpo_pipeline.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "score", *map(str, common), "--out", outs[0]], stdout=subprocess.DEVNULL
    ) as process:
        records = outs[0] / ".scoring" / ".units"
        while process.poll() is None and not list(records.glob("*.json")):
            time.sleep(0.01)
        process.kill()
    committed = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert committed
    assert not (outs[0] / "scores.json").exists()
    for out in outs:
        done = here_on_ray("smpo-pipeline", "score", *common, "--out", out, "--concurrency", 2)
        assert done.returncode == 0, done.stderr
    first, second = map(read_scores_info, outs)
    assert first == second
    assert (first.scored, first.rejected) == (300, 60)
    assert sorted(path.name for path in outs[0].iterdir()) == sorted(path.name for path in outs[1].iterdir())


def test_every_scored_pair_is_in_a_shard(inputs, scores, shards):
    directory = ShardDirectory(shards)
    manifest, samples = directory.manifest, list(directory.samples())
    rows = {str(row["ranking_id"]): row for row in pair_rows()}
    assert manifest.totals.pairs_in == len(rows) == manifest.totals.pairs + manifest.totals.rejected
    assert [sample.meta.pair_id for sample in samples] == sorted(set(rows) - REJECTED_IDS - {"1015"})
    table = {row["pair_id"]: row for row in read_scores(scores, read_scores_info(scores)).to_pylist()}
    for sample in samples:
        row, score_row = rows[sample.meta.pair_id], table[sample.meta.pair_id]
        assert sample.meta.prompt == row["caption"]
        assert sample.meta.scores["pickscore"] == (score_row["pickscore_0"], score_row["pickscore_1"])
        sizes = [decode_image(row[f"jpg_{index}"]).size for index in range(2)]
        assert sample.meta.size == tuple((height, width) for width, height in sizes)
        assert sample.noise_K2Chw.shape == (3, 2, 4, 8, 8)
    long = [sample for sample in samples if len(sample.meta.prompt) > 100]
    assert manifest.totals.prompts_cut == len(long) > 0
    assert manifest.rewards == read_scores_info(scores).rewards
    assert sum(entry.pairs for entry in manifest.shards) == manifest.totals.pairs
    assert len(manifest.shards) == 3
    assert json.loads((shards / "run.json").read_text())["seed"] == 0


def test_scores_of_another_prompt_belong_to_another_pair(inputs, scores, tmp_path, here_on_ray):
    changed = tmp_path / "scores"
    shutil.copytree(scores, changed)
    path = changed / read_scores_info(scores).parts[0].name
    rows = pq.read_table(path).to_pylist()
    rows[1]["prompt"] = "another"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)
    done = invert(inputs, changed, tmp_path / "out", "--limit", 2, run=here_on_ray)
    assert done.returncode == 0, done.stderr
    (reject,) = read_rejects(tmp_path / "out" / "rejected.parquet")
    assert reject.pair_id == rows[1]["pair_id"]
    assert reject.reason.startswith("other pair: ")


def test_two_workers_give_the_same_bytes_as_one(inputs, scores, shards, tmp_path, here_on_ray):
    """``shards`` was made by one worker."""
    done = invert(inputs, scores, tmp_path / "out", "--batch-size", 4, "--concurrency", 2, run=here_on_ray)
    assert done.returncode == 0, done.stderr
    mine, theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path / "out", shards)
    )
    assert mine.pop("config.yaml") != theirs.pop("config.yaml")  # it names --out and --concurrency
    assert mine == theirs


def test_batch_size_and_order_change_results_only_by_rounding(inputs, scores, shards, tmp_path, here_on_ray):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for name, source in (("a", "part-1"), ("b", "part-0")):
        shutil.copy(inputs / "pairs" / f"{source}.parquet", pairs / f"{name}.parquet")
    other = tmp_path / "out"
    common = ("--scores", scores, "--model", inputs / "model", "--out", other, "--device", "cpu", "--steps", 3)
    changed = ("--batch-size", 1, "--concurrency", 2, "--pairs-per-shard", 5)
    done = here_on_ray("smpo-pipeline", "invert", "--pairs", pairs, *common, *changed)
    assert done.returncode == 0, done.stderr
    mine = {sample.meta.pair_id: sample for sample in ShardDirectory(shards).samples()}
    theirs = {sample.meta.pair_id: sample for sample in ShardDirectory(other).samples()}
    assert mine.keys() == theirs.keys()
    for name, sample in mine.items():
        assert theirs[name].meta == sample.meta
        for tensor_name, tensor in sample.tensors().items():
            twin = theirs[name].tensors()[tensor_name]
            torch.testing.assert_close(twin.double(), tensor.double(), rtol=2e-3, atol=5e-4, equal_nan=True)


def test_a_finished_run_is_not_changed(inputs, scores, shards, capfd):
    run = partial(run_here, capfd)
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    time = (shards / "shard-000000.tar").stat().st_mtime_ns
    done = invert(inputs, scores, shards, "--batch-size", 4, run=run)
    assert done.returncode == 0
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    assert (shards / "shard-000000.tar").stat().st_mtime_ns == time
    assert_one_line(invert(inputs, scores, shards, "--seed", 1, run=run), "finished run", "seed: 0 there, 1 here")
    done = invert(inputs, scores, shards, "--eta", 0.1, "--renoise-steps", 0, run=run)
    assert_one_line(done, "inversion.eta: 0.0 there, 0.1 here", "inversion.renoise_steps", "--overwrite")


def test_a_killed_run_is_finished_by_the_same_command(inputs, scores, shards, tmp_path, here_on_ray):
    """One unit is committed, one half written, one missing."""
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    (out / "manifest.json").unlink()
    entry = ShardDirectory(shards).manifest.shards[1]
    record = UnitRecord(unit=1, pairs_in=6, pairs=entry.pairs, rejects=[], entry=entry.model_dump())
    rejected = [reject for reject in read_rejects(shards / "rejected.parquet") if ":" in reject.source]
    inside = [reject for reject in rejected if reject.pair_id == "1007"]
    record = record.model_copy(update={"rejects": inside, "health": HealthSums().to_lists()})
    Run(out, "manifest.json", read_identity(out)).commit(record)
    (out / "shard-000000.tar").write_bytes(b"half")
    (out / "shard-000002.tar").unlink()
    written = (out / "shard-000001.tar").stat().st_mtime_ns
    done = invert(inputs, scores, out, "--batch-size", 4, run=here_on_ray)
    assert done.returncode == 0, done.stderr
    assert (out / "shard-000001.tar").stat().st_mtime_ns == written
    for unit in range(3):
        name = f"shard-{unit:06d}.tar"
        assert (out / name).read_bytes() == (shards / name).read_bytes()
    assert not (out / ".units").exists()


@pytest.mark.parametrize("flags", [("forward",), ("truncated", "--truncated-steps", 1, "--states", 3)], ids=str)
def test_other_sources_through_the_command_line(inputs, scores, tmp_path, here_on_ray, flags):
    """Forward-noised states with scores, truncated ones without, as their objective needs none."""
    scores = scores if "forward" in flags else None
    done = invert(
        inputs, scores, tmp_path / "out", "--limit", 4, "--trajectories", 2, "--source", *flags, run=here_on_ray
    )
    assert done.returncode == 0, done.stderr
    manifest = ShardDirectory(tmp_path / "out").manifest
    assert bool(manifest.rewards) == bool(scores) != ("the shards have no scores" in done.stdout)
    totals = manifest.totals
    assert (totals.pairs_in, totals.pairs, totals.rejected, totals.samples, totals.states) == (4, 3, 1, 6, 18)
    assert ("--objective selfnpo --out runs/selfnpo" in done.stdout) == ("truncated" in flags)


def test_all_pairs_rejected_is_one_line_with_the_reason(inputs, tmp_path, here_on_ray):
    path = tmp_path / "bad.parquet"
    row = pair_rows()[0] | {"jpg_0": b"nonsense"}
    pq.write_table(pa.Table.from_pylist([row]), path)
    done = here_on_ray(
        *("smpo-pipeline", "score", "--pairs", path, "--reward", f"pickscore={inputs / 'pickscore'}"),
        *("--out", tmp_path / "out", "--device", "cpu"),
    )
    assert_one_line(done, "no pair could be scored", "image not readable")
    assert len(read_rejects(tmp_path / "out" / "rejected.parquet")) == 1


def test_training_from_these_shards_starts_at_ln_2(inputs, shards, tmp_path):
    """The trainer's reference errors equal those that invert stored, so the first margins are 0."""
    out = tmp_path / "run"
    done = run_command(
        *("smpo-train", "--shards", shards, "--model", inputs / "model", "--out", out, "--reward", "pickscore"),
        *("--batch-size", 13, "--max-steps", 2, "--lr", 1e-4),
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert (out / "unet" / "config.json").is_file()


def test_sdxl_solved_by_anderson_and_inverted_by_a_lora(inputs, scores, tmp_path, capfd, here_on_ray):
    """A second round: shards, a LoRA trained on them, and new shards inverted by the LoRA; the reference stays."""
    model = make_tiny_xl(tmp_path / "xl")
    few = ("--model", model, "--limit", 4)
    first, lora, second = (tmp_path / name for name in ("first", "lora", "second"))
    done = invert(
        inputs,
        scores,
        first,
        *few,
        "--solver",
        "anderson",
        "--max-evaluations",
        4,
        "--tolerance",
        1e-3,
        run=here_on_ray,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    manifest = ShardDirectory(first).manifest
    assert (manifest.model.kind, manifest.inversion.solver) == ("sdxl", "anderson")
    assert sum(band.solved for band in manifest.health) == 2 * manifest.totals.states
    done = run_command(
        *("smpo-train", "--shards", first, "--model", model, "--out", lora, "--reward", "pickscore"),
        *("--batch-size", 4, "--max-steps", 2, "--lr", 1e-2, "--lora-rank", 4, "--warmup-steps", 0),
    )
    assert done.returncode == 0, done.stderr
    done = invert(inputs, scores, second, *few, "--inverting-unet", lora, run=here_on_ray)
    assert done.returncode == 0, done.stderr
    again = ShardDirectory(second).manifest
    assert (
        again.model.reference
        == manifest.model.reference
        == manifest.model.inverting_denoiser
        != again.model.inverting_denoiser
    )
