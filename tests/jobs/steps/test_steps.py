"""``smpo-pipeline steps`` through the command line, on Ray, and training on its shards."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smpo_pipeline.jobs.record.status import read_status
from smpo_schemas.manifest import read_manifest
from smpo_schemas.rejects import read_rejects
from smpo_schemas.shards.reader import ShardDirectory
from tests.command import assert_one_line, run_here
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model

pytestmark = pytest.mark.slow

PROMPTS = ["a cat", "", "a dog", "cat and dog", "a cat", "and"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model")
    make_tiny_clip(folder / "clipscore")
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def command(world: Path, out: Path, *more: object) -> list[object]:
    """Options given later replace earlier ones."""
    fixed = ("--model", world / "model", "--prompts", world / "prompts.jsonl", "--out", out, "--device", "cpu")
    fixed += ("--reward", f"clipscore={world / 'clipscore'}", "--steps", 4, "--trained", "4,3", "--text", "stored")
    fixed += ("--prompts-per-shard", 2, "--batch-size", 3, "--concurrency", 1)
    return ["smpo-pipeline", "steps", *fixed, *more]


@pytest.fixture(scope="module")
def shards(world: Path, tmp_path_factory: pytest.TempPathFactory, on_ray) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    done = on_ray(*command(world, out, "--max-reject-rate", 0.5))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "5 prompts x 1 x 2 pairs at 32 x 32 pixels; steps 4,3 of 4, guidance scale 5" in done.stdout
    assert f"8 pairs, {read_manifest(out).totals.bytes / 1e6:.1f} MB in 3 shards, 2 rejected" in done.stdout
    return out


def test_every_prompt_has_its_pairs_or_a_reason(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert (manifest.totals.pairs_in, manifest.totals.pairs, manifest.totals.rejected) == (10, 8, 2)
    assert [reject.reason for reject in read_rejects(shards / "rejected.parquet")] == [
        "no prompt: the row is blank"
    ] * 2
    assert (manifest.inversion.source, manifest.inversion.eta, manifest.inversion.guidance_scale) == ("steps", 1, 5)
    assert manifest.steps
    assert (manifest.steps.grid, manifest.steps.trained) == ([1, 251, 501, 751], [4, 3])
    samples = list(ShardDirectory(shards).samples())
    assert [(sample.meta.prompt, *sample.timestep_K.tolist()) for sample in samples] == [
        (prompt, t) for prompt in ("a cat", "a dog", "cat and dog", "and") for t in (751, 501)
    ]
    scores = [score for sample in samples for score in sample.meta.scores["clipscore"]]
    statistics = manifest.rewards["clipscore"]
    assert (statistics.min, statistics.max) == (min(scores), max(scores))
    assert (statistics.agreement, statistics.num_labelled) == (1, 8)
    status = read_status(shards)
    assert (status.job, status.finished, status.units, status.pairs_in, status.rejected) == ("steps", True, 3, 10, 2)


def test_training_needs_the_shards_alone(world: Path, shards: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    """And begins with no margin: the reference's errors are those of the stored states."""
    own = ("--shards", shards, "--model", world / "model", "--out", tmp_path / "run", "--objective", "dpo")
    own += ("--timestep-weighting", "transition", "--beta", 0.1, "--max-steps", 2, "--batch-size", 4, "--dtype", "fp32")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    done = run_here(capfd, "smpo-train", *own)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert abs(first["rewards/margins"]) < 1e-6
    described = run_here(capfd, "smpo-pipeline", "inspect", shards, "--out", tmp_path / "sheet.png")
    assert "2 draws of each of the sampler's steps 4, 3 of 4, eta 1, guidance 5" in " ".join(described.stdout.split())
    assert (tmp_path / "sheet.png").is_file()


def test_killed_and_run_again_gives_the_same(
    world: Path, shards: Path, tmp_path: Path, ray_address, here_on_ray
) -> None:
    out = tmp_path / "out"
    arguments = command(world, out, "--max-reject-rate", 0.5, "--ray-address", ray_address)[1:]
    with subprocess.Popen(
        [sys.executable, "-m", "smpo_pipeline", *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while process.poll() is None and not list((out / ".units").glob("*.json")):
            time.sleep(0.01)
        process.kill()
    assert not (out / "manifest.json").is_file()
    done = here_on_ray(*command(world, out, "--max-reject-rate", 0.5))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in shards.iterdir() if path.is_file()}
    assert {path.name for path in out.iterdir() if path.is_file()} == names
    for name in names - {"config.yaml"}:
        assert (out / name).read_bytes() == (shards / name).read_bytes()


def test_mistakes_are_one_line(world: Path, shards: Path, tmp_path: Path, capfd) -> None:
    def run(*more: object, out: Path = tmp_path / "no") -> subprocess.CompletedProcess[str]:
        return run_here(capfd, *command(world, out, *more))

    assert_one_line(run("--eta", 0), "--eta 0: the steps of", "need noise")
    assert_one_line(run("--trained", "4,x"), "--trained 4,x: expected numbers of steps")
    assert_one_line(run("--trained", "5"), "--trained 5: --steps 4 has the steps 1")
    assert_one_line(run("--gradient-delta", 1), "--gradient-delta 1: it is of --gradient-guidance")
    truth = ("--reward", "toy-truth", "--gradient-guidance")
    assert_one_line(run(*truth), "the reward toy-truth gives no gradient; those that do: aesthetic, clipscore")
    assert_one_line(run("--seed", 1, out=shards), "a finished run with other settings (seed: 0 there, 1 here)")
    assert not (tmp_path / "no").exists()
