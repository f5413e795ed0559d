"""CaPO end to end, from prompts alone: each stage reads what the one before it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from smpo_schemas.manifest import read_manifest
from smpo_schemas.pairs import image_id
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from tests.command import run_here
from tests.selection.helpers import win_rates
from tests.trainer.helpers import arguments, run_cli

pytestmark = pytest.mark.slow

PROMPTS = [f"a cat {number}" for number in range(4)]
REWARDS = ("pickscore", "clipscore")
SCALE = 0.01
"""Of both rewards, which are cosines: their log-odds are 100 times the cosine."""

RANGES = [f"{name}=0:{SCALE}" for name in REWARDS]


def calibrated(scores: Path) -> dict[tuple[str, str], np.ndarray]:
    """CaPO's calibrated rewards [2] by prompt and image, one prompt at a time."""
    table = read_scores(scores, read_scores_info(scores)).to_pylist()
    of_prompt: dict[str, dict[str, list[float]]] = {}
    for row in table:
        for side in (0, 1):
            values = [row[f"{name}_{side}"] for name in REWARDS]
            of_prompt.setdefault(row["prompt"], {})[row[f"image_{side}_id"]] = values
    rates = {}
    for prompt, images in of_prompt.items():
        columns = [win_rates(column, SCALE) for column in zip(*images.values(), strict=True)]
        rates |= {(prompt, image): rate for image, rate in zip(images, np.array(columns).T, strict=True)}
    return rates


def test_capo_from_prompts_to_a_trained_model(
    inputs: Path,
    tmp_path: Path,
    here_on_ray,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    candidates, scores, selected, shards, out = (
        tmp_path / name for name in ("made", "scores", "pairs", "shards", "run")
    )
    model, prompts = inputs / "model", tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def run(*command: object) -> str:
        done = here_on_ray("smpo-pipeline", *command)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    sampling = ("--images-per-prompt", 4, "--steps", 2, "--guidance-scale", 1, "--device", "cpu")
    run("generate", "--model", model, "--prompts", prompts, *sampling, "--out", candidates)
    rewards = [f"{name}={inputs / name}" for name in REWARDS]
    run("score", "--pairs", candidates, "--reward", *rewards, "--out", scores)
    chosen = ("--by", "pareto", "--reward-range", *RANGES, "--out", selected)
    done = run_here(capfd, "smpo-pipeline", "select", "--candidates", candidates, "--scores", scores, *chosen)
    assert done.returncode == 0, done.stderr
    noise = ("--source", "forward", "--forward-noise", "image", "--steps", 2, "--device", "cpu")
    pairs = ("--pairs", selected / "pairs.parquet", "--scores", selected / "scores")
    run("invert", *pairs, "--model", model, *noise, "--out", shards)

    rows = {row["pair_id"]: row for row in pq.read_table(selected / "pairs.parquet").to_pylist()}
    samples = list(ShardDirectory(shards).samples())
    assert {sample.meta.pair_id for sample in samples} == rows.keys()
    assert read_manifest(shards).inversion.forward_noise == "image"
    assert all((sample.noise_K2Chw[:, 0] != sample.noise_K2Chw[:, 1]).any() for sample in samples)

    options = {"objective": "capo", "preference": "winrate", "scores": selected / "scores", "reward": list(REWARDS)}
    run_options = {**options, "reward_range": RANGES, "max_steps": 1, "batch_size": 2 * len(samples)}
    assert run_cli(monkeypatch, arguments(shards, model, out, **run_options)) == 0
    assert "WARNING: --objective capo" not in capfd.readouterr().out
    (step,) = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    rate = calibrated(scores)
    targets = [
        (rate[row["prompt"], image_id(row["image_0"])] - rate[row["prompt"], image_id(row["image_1"])]).mean()
        for row in rows.values()
    ]
    # At the reference h is 0, and the loss is the square of the target.
    assert step["loss"] == pytest.approx(np.square(targets).mean(), abs=1e-4)
