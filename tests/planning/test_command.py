"""The command `plan`, and its numbers against what `invert` then writes."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smpo_common.options import fields_of
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.planning.options import MemoryOptions, PlanOptions
from smpo_schemas.manifest import read_manifest
from tests.command import assert_one_line, run_here
from tests.pictures import encode, picture
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model


def test_plan_accepts_every_flag_of_invert():
    mine, theirs = ({name for name, *_ in fields_of(model)} for model in (PlanOptions, InvertOptions))
    assert theirs <= mine
    training = {field for field, *_ in fields_of(MemoryOptions)}
    assert mine - theirs == {"gpus", "price", "seconds", "json"} | training


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "pairs").mkdir()
    rows = [
        {
            "jpg_0": encode(picture(seed=number)),
            "jpg_1": encode(picture(64, 48, seed=number + 50)),
            "caption": ("a cat", "dog " * 300, "Größe 東京")[number % 3],
            "label_0": (1.0, 0.0, 0.5)[number % 3],
            "ranking_id": number,
            "user_id": number % 4,
        }
        for number in range(10)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs" / "part.parquet", row_group_size=4)
    make_tiny_model(folder / "model")
    return folder


def run_plan(inputs, capfd, *more):
    common = ("--pairs", inputs / "pairs", "--model", inputs / "model", "--device", "cpu", "--seconds", 0.1)
    return run_here(capfd, "smpo-pipeline", "plan", *common, *more)


def test_a_shard_size_needs_a_unit_and_excludes_pairs_per_shard(inputs, capfd):
    for size in ("500", "5XB", "0MB", "1.5GB"):
        assert_one_line(run_plan(inputs, capfd, "--shard-size", size), f"--shard-size {size}: ", "500MB")
    done = run_plan(inputs, capfd, "--shard-size", "5MB", "--pairs-per-shard", 4)
    assert_one_line(done, "--shard-size 5MB", "--pairs-per-shard")


def test_a_shard_size_gives_the_number_of_shards(inputs, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        "smpo_pipeline.planning.plan.with_most_pixels", lambda *_: pytest.fail("the batch size is given")
    )
    out = tmp_path / "plan.json"
    done = run_plan(inputs, capfd, "--steps", 3, "--batch-size", 4, "--shard-size", "30kB", "--json", out)
    assert done.returncode == 0, done.stderr
    # x0 and three noises of 1024 bytes each and some headers, in about 6 kB: 4 pairs per tar.
    assert json.loads(out.read_text())["projections"][0]["shards"] == 3


def test_a_plan_is_printed_and_written_as_json(inputs, tmp_path, capfd):
    out = tmp_path / "plan.json"
    flags = ("--steps", 3, "--batch-size", 4, "--trajectories", 2, "--pairs-per-shard", 4, "--gpus", 4, "--price", 2.5)
    done = run_plan(inputs, capfd, *flags, "--json", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    plan = json.loads(out.read_text())
    assert (plan["batch_size"], plan["settings"]["steps"], plan["usable"], plan["sampled"]) == (4, 3, 1.0, 10)
    # Two images, two evaluations per step and one forward per state for the reference error.
    assert (plan["forwards_a_trajectory"], plan["forwards_measured"]) == (2 * 3 * 3, False)
    own, million, more = plan["projections"]
    assert (own["pairs"], own["shards"], own["states"]) == (10, 3, 10 * 2 * 3)
    assert (million["pairs"], million["shards"], more["pairs"]) == (10**6, 250_000, 10**8)
    for projection in (own, million, more):
        hours = projection["pairs"] / plan["pairs_per_second"] / 3600
        assert projection["device_hours"] == pytest.approx(hours)
        assert projection["wall_hours"] == pytest.approx(hours / 4)
        assert projection["dollars"] == pytest.approx(hours * 2.5)
    rate = plan["measured_trajectories"] / plan["measured_seconds"] / 2
    assert plan["pairs_per_second"] == pytest.approx(rate)
    for words in (
        "10 pairs at 32 x 32 pixels; cpu, fp32; batches of 4 trajectories",
        "100,000,000",
        "250,000",
        "CPU hours",
        "dollars",
        "18 forwards of the denoiser (exact)",
    ):
        assert words in done.stdout


def test_plan_accepts_the_command_line_of_invert_and_stores_nothing(inputs, tmp_path, capfd):
    idle = ("--out", tmp_path / "shards", "--concurrency", 4, "--ray-address", "auto", "--overwrite")
    done = run_plan(inputs, capfd, "--steps", 2, "--batch-size", 2, *idle)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_warns_of_more_rejects_than_invert_allows(inputs, tmp_path, capfd):
    rows = pq.read_table(inputs / "pairs").to_pylist()
    for row in rows[:2]:
        row["jpg_0"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    flags = ("--steps", 2, "--batch-size", 2, "--pairs", tmp_path / "pairs.parquet")
    printed = run_plan(inputs, capfd, *flags).stdout
    assert "10.0% of 20 " in printed
    assert "--max-reject-rate 0.05" in printed
    assert "WARNING" not in run_plan(inputs, capfd, *flags, "--max-reject-rate", 0.2).stdout


def test_forwards_of_adaptive_solvers_are_measured(inputs, tmp_path, capfd):
    flags = ("--steps", 2, "--solver", "adaptive", "--max-evaluations", 3, "--tolerance", "1e-9", "--batch-size", 2)
    done = run_plan(inputs, capfd, *flags, "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    # No image reaches this tolerance: all use their three evaluations.
    assert (plan["forwards_a_trajectory"], plan["forwards_measured"]) == (2 * 2 * (3 + 1), True)
    assert "(measured)" in done.stdout


def test_batch_size_auto_is_chosen_before_measuring(inputs, tmp_path, capfd):
    flags = ("--steps", 2, "--batch-size", "auto", "--pairs-per-shard", 3, "--json", tmp_path / "plan.json")
    done = run_plan(inputs, capfd, *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["batch_size"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--batch-size", "many"), ("--batch-size many", "auto")),
        (("--batch-size", "0"), ("--batch-size 0", "from 1")),
        (
            ("--steps", "400"),
            ("--steps 400", "207 steps", "1000 timesteps", "--timesteps grid"),
        ),
        (("--steps", "1000"), ("--steps 1000", "1000 timesteps")),
        (("--start", "1000"), ("--start 1000", "0 to 999")),
        (("--resolution", "36"), ("--resolution 36", "multiple")),
        (("--pairs", "nowhere.parquet"), ("nowhere.parquet", "does not exist")),
        (("--scores", "nowhere"), ("nowhere",)),
        (("--solver", "ddim", "--renoise-steps", "2"), ("--renoise-steps", "ddim")),
        (("--timesteps", "published", "--states", "3"), ("--states 3", "one state")),
        (("--timesteps", "published", "--states", "3", "--source", "forward"), ("--states 3", "one state")),
    ],
)
def test_mistakes_are_one_line(inputs, capfd, flags, parts):
    assert_one_line(run_plan(inputs, capfd, *flags), *parts)


def test_a_batch_that_runs_out_of_memory_is_one_line(inputs, capfd, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("smpo_pipeline.planning.plan.measure_rate", full)
    done = run_plan(inputs, capfd, "--steps", 2, "--batch-size", 64)
    assert_one_line(done, "--batch-size 64", "CUDA out of memory.", "--batch-size auto")


def test_a_missing_gpu_is_an_error(inputs, capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_one_line(run_plan(inputs, capfd, "--device", "cuda"), "--device cuda", "no GPU")


@pytest.mark.slow
def test_the_plan_predicts_bytes_shards_and_states(inputs, tmp_path, capfd, here_on_ray):
    reward = f"clipscore={make_tiny_clip(tmp_path / 'clip')}"
    common = ("--pairs", inputs / "pairs", "--device", "cpu")
    scored = here_on_ray("smpo-pipeline", "score", *common, "--reward", reward, "--out", tmp_path / "scores")
    assert scored.returncode == 0, scored.stderr
    next_flags = f"--pairs {inputs / 'pairs'} --scores {tmp_path / 'scores'} --model MODEL"
    assert f"next: smpo-pipeline invert {next_flags}" in scored.stdout
    flags = ("--scores", tmp_path / "scores", "--model", inputs / "model", "--steps", 3, "--pairs-per-shard", 4)
    out = tmp_path / "shards"
    made = here_on_ray("smpo-pipeline", "invert", *common, *flags, "--batch-size", "auto", "--out", out)
    assert made.returncode == 0, made.stderr
    assert "--batch-size auto: batches of" in made.stdout
    assert f"next: smpo-train --shards {out} --model {inputs / 'model'} --reward clipscore" in made.stdout
    assert not list(out.glob(".batch-size*"))
    assert run_plan(inputs, capfd, *flags[:2], *flags[4:], "--json", tmp_path / "plan.json").returncode == 0
    own = json.loads((tmp_path / "plan.json").read_text())["projections"][0]
    manifest = read_manifest(out)
    assert (own["shards"], own["states"]) == (len(manifest.shards), manifest.totals.states)
    assert own["bytes"] == pytest.approx(manifest.totals.bytes, rel=0.01)
