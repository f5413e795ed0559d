"""The whole way on the embedded world's flow model: pairs, scores, shards, training, evaluation."""

from __future__ import annotations

import math
from functools import partial

import pyarrow.parquet as pq
import pytest

from smpo_common.files import read_json
from smpo_schemas.manifest import read_manifest
from tests.command import run_here
from tests.trainer.helpers import column


@pytest.mark.slow
def test_from_its_own_pairs_to_a_report(tmp_path, capfd, here_on_ray) -> None:
    world, scores, shards, tuned = (tmp_path / name for name in ("world", "scores", "shards", "tuned"))

    def run(program: str, command: object, *arguments: object) -> None:
        on_ray = command in ("score", "invert")
        done = (here_on_ray if on_ray else partial(run_here, capfd))(program, command, *arguments)
        assert done.returncode == 0, done.stderr

    run("smpo-pipeline", "toy", "--out", world, "--pairs", 4, "--family", "sd3")
    reward = f"pickscore={world / 'rewards/pickscore'}"
    run("smpo-pipeline", "score", "--pairs", world / "pairs", "--reward", reward, "--out", scores)
    common = ("--pairs", world / "pairs", "--scores", scores, "--model", world / "model")
    run("smpo-pipeline", "invert", *common, "--steps", 3, "--out", shards)
    manifest = read_manifest(shards)
    assert (manifest.model.kind, manifest.totals.pairs) == ("sd35", 4)
    training = ("--max-steps", 2, "--batch-size", 4, "--beta", 1000, "--warmup-steps", 1)
    run(
        "smpo-train", "--shards", shards, "--model", world / "model", "--reward", "pickscore", "--out", tuned, *training
    )
    assert column(tuned, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text((world / "prompts/test.txt").read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    models, sampling = (f"base={world / 'model'}", f"tuned={tuned}"), ("--images-per-prompt", 2, "--steps", 3)
    run(
        *("smpo-pipeline", "evaluate", "--model", *models, "--prompts", prompts, *sampling, "--guidance-scale", 1),
        *("--reward", "toy-truth", "--out", tmp_path / "report"),
    )
    table = pq.read_table(tmp_path / "report/scores.parquet").to_pydict()
    assert table["model"] == ["base"] * 2 + ["tuned"] * 2
    assert all(0 <= reward <= 1 for reward in table["toy-truth"])
    assert read_json(tmp_path / "report/results.json")["baseline"] == "base"
