"""What ``select`` writes goes through ``invert`` and ``smpo-train`` unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from smpo_schemas.shards.reader import ShardDirectory
from tests.command import run_here
from tests.pictures import encode, picture
from tests.selection.helpers import make_candidates
from tests.trainer.helpers import arguments, run_cli

pytestmark = pytest.mark.slow

PROMPTS = {f"a cat {n}": [(float(n), 0.0), (1.0, 2.0), (3.0, float(n)), (-1.0, -2.0)] for n in range(4)}


def image(prompt: str, index: int) -> bytes:
    return encode(picture(48, 40, seed=4 * int(prompt[-1]) + index))


def test_from_candidates_to_a_trained_model(inputs, tmp_path, capfd, here_on_ray, monkeypatch) -> None:
    candidates, scores = make_candidates(tmp_path / "in", PROMPTS, image=image)
    out, shards, run = (tmp_path / name for name in ("selected", "shards", "run"))
    command = ("--candidates", candidates, "--scores", scores, "--by", "pareto", "--out", out)
    done = run_here(capfd, "smpo-pipeline", "select", *command)
    assert done.returncode == 0, done.stderr
    pairs = {row["pair_id"]: row for row in pq.read_table(out / "pairs.parquet").to_pylist()}

    inverted = ("--pairs", out / "pairs.parquet", "--scores", out / "scores", "--model", inputs / "model")
    done = here_on_ray("smpo-pipeline", "invert", *inverted, "--out", shards, "--steps", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    samples = [sample.meta for sample in ShardDirectory(shards).samples()]
    assert {sample.pair_id for sample in samples} == pairs.keys()
    assert len(pairs) == len(PROMPTS)
    for sample in samples:
        row = pairs[sample.pair_id]
        assert (sample.prompt, sample.label, sample.annotator) == (row["prompt"], None, "select:pareto")
        expected = [PROMPTS[row["prompt"]][row[f"noise_{side}"]["index"]] for side in (0, 1)]
        assert list(zip(sample.scores["a"], sample.scores["b"], strict=True)) == expected

    options = {"preference": "winrate", "scores": out / "scores", "reward": ["a", "b"], "objective": "capo"}
    assert run_cli(monkeypatch, arguments(shards, Path(inputs / "model"), run, max_steps=2, **options)) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(step["loss"] > 0 for step in steps)
