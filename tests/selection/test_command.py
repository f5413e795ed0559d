"""``smpo-pipeline select`` as users run it, on candidates in the layout of ``generate``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smpo_pipeline.images.image_store import ImageStore
from smpo_pipeline.selection import run as run_module
from smpo_pipeline.weighing.table import write_column
from smpo_schemas.generation.selection import read_selection
from smpo_schemas.pairs import image_id
from smpo_schemas.preference.winrate import WinRate
from smpo_schemas.rejects import read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from smpo_trainer.preference.preference_table import preference_table
from tests.command import assert_one_line, run_here
from tests.pictures import encode, picture
from tests.selection.helpers import PROMPTS, image_of, make_candidates, rows_of, sides, win_rates

RAW = ("--reward-range", "a=raw", "b=raw")


def files_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "config.yaml"  # names --out
    }


def mean_rates(scores) -> list[float]:
    """Win rates of log-odds, the mean over rewards."""
    return np.mean([win_rates(list(column)) for column in zip(*scores, strict=True)], axis=0).tolist()


def test_best_against_worst_of_every_prompt(select, made, tmp_path):
    done = select(*made, tmp_path / "out", *RAW)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["a cat", "a dog", "two"]
    for prompt, row in rows.items():
        rates = mean_rates(PROMPTS[prompt])
        best, worst = int(np.argmax(rates)), int(np.argmin(rates))
        images = [row["image_0"], row["image_1"]]
        assert images[row["chosen_image"]] == image_of(prompt, best)
        assert images[1 - row["chosen_image"]] == image_of(prompt, worst)
        assert row["gap"] == pytest.approx(rates[best] - rates[worst], rel=1e-9)
        assert (row["label"], row["annotator"]) == (None, "select:extremes")
        ids = sorted(map(image_id, images))
        assert row["pair_id"] == hashlib.sha256("\n".join([*ids, prompt]).encode()).hexdigest()[:32]
        places = [row[f"noise_{side}"]["index"] for side in (0, 1)]  # further columns follow their images
        assert [image_of(prompt, index) for index in places] == images
        assert (row["noise_0"]["seed"], row["model"], row["noise_0"]["shape"]) == (7, "fingerprint", [4, 8, 8])
        same_row = any({best, worst} == set(pair) for pair in sides(len(PROMPTS[prompt])))
        assert (row["row"] is not None) == same_row

    rejects = read_rejects(tmp_path / "out" / "rejected.parquet")
    assert [(each.kind, each.stage) for each in rejects] == [("one image", "select"), ("all equal", "select")]
    assert "2 images of 'equal'" in rejects[1].reason
    assert rejects[1].source.endswith("candidates-000000.parquet:5")
    info = read_selection(tmp_path / "out")
    assert (info.prompts, info.prompts_with_pairs, info.pairs, info.rejected) == (5, 3, 3, 2)
    assert (info.rows, info.images) == (7, 12)
    assert info.gaps.mean == pytest.approx(np.mean([row["gap"] for row in rows.values()]))
    assert info.pairs_sha256 == hashlib.sha256((tmp_path / "out" / "pairs.parquet").read_bytes()).hexdigest()
    assert "3, from 3 of the prompts" in done.stdout
    assert "one image (1)" in done.stdout
    out = tmp_path / "out"
    command = f"next: smpo-pipeline invert --pairs {out / 'pairs.parquet'} --scores {out / 'scores'} --model MODEL"
    assert command in done.stdout


def test_training_sees_the_win_rates_over_all_candidates(select, made, tmp_path):
    """CaPO's target R_0 - R_1, the mean over rewards, is 2p - 1 of ``--preference winrate``."""
    done = select(*made, tmp_path / "out", *RAW)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "scores"
    info, old = read_scores_info(folder), read_scores_info(made[1])
    scales = {name: each.model_copy(update={"min": 0.0, "max": 1.0}) for name, each in info.rewards.items()}
    table = preference_table(folder, info, WinRate({"a": 1, "b": 1}, scales), print)
    for prompt, row in rows_of(tmp_path / "out").items():
        assert table.pairs[row["pair_id"]][0] == prompt
        p = table.pairs[row["pair_id"]][1]
        assert 2 * p - 1 == pytest.approx(row["gap"] * (1 if row["chosen_image"] == 0 else -1), rel=1e-9)
    assert info.scored == 3 + old.scored
    values = np.array([scores for prompt in PROMPTS.values() for scores in prompt])  # an image counts once
    for k, name in enumerate(("a", "b")):
        statistics, before = info.rewards[name], old.rewards[name]
        assert (statistics.min, statistics.max) == (before.min, before.max)
        assert statistics.mean == pytest.approx(values[:, k].mean())
        assert statistics.std == pytest.approx(values[:, k].std())
        assert statistics.fingerprint == before.fingerprint


def test_labels_and_positions(select, tmp_path):
    prompts = {f"prompt {number}": [(0.0, 0.0), (1.0, 1.0)] for number in range(40)}
    made = make_candidates(tmp_path / "in", prompts)
    assert select(*made, tmp_path / "out", "--label").returncode == 0
    rows = rows_of(tmp_path / "out").values()
    assert {row["label"] for row in rows} == {0.0, 1.0}
    assert all(row["label"] == 1 - row["chosen_image"] for row in rows)
    assert 10 < sum(row["chosen_image"] for row in rows) < 30  # a fair coin's 0.998
    table = {
        row["pair_id"]: row
        for row in read_scores(tmp_path / "out/scores", read_scores_info(tmp_path / "out/scores")).to_pylist()
    }
    for row in rows:
        scored = table[row["pair_id"]]
        assert (scored["label"], scored["a_1"] - scored["a_0"]) == (row["label"], 1 - 2 * row["label"])
        assert scored["image_0_id"] == image_id(row["image_0"])


@pytest.mark.parametrize("by", ["extremes", "pareto", "ranking"])
def test_twice_is_the_same_to_the_byte(select, made, tmp_path, by):
    flags = ("--pairs-per-prompt", 2)
    for name in ("one", "two"):
        assert select(*made, tmp_path / name, *flags, by=by).returncode == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert set(files_of(tmp_path / "one")) == {
        *("pairs.parquet", "rejected.parquet", "run.json", "selection.json"),
        *("scores/scores-2-000000.parquet", "scores/scores-2-000001.parquet", "scores/scores.json"),
    }


@pytest.mark.parametrize("by", ["extremes", "pareto"])
def test_the_order_of_the_candidates_changes_nothing(select, made, tmp_path, by):
    other = make_candidates(tmp_path / "other", PROMPTS, order=[4, 3, 6, 1, 0, 5, 2], swap=True)
    chosen = []
    for inputs, name in ((made, "one"), (other, "two")):
        assert select(*inputs, tmp_path / name, "--pairs-per-prompt", 3, by=by).returncode == 0
        table = pq.read_table(tmp_path / name / "pairs.parquet").drop_columns("row").sort_by("pair_id")
        chosen.append(table.to_pylist())
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) > 3


def test_images_that_wait_may_lie_on_disk(select, tmp_path, monkeypatch):
    """The rows of the prompts are far apart."""
    made = make_candidates(tmp_path / "in", PROMPTS, order=[6, 4, 2, 0, 1, 3, 5])
    assert select(*made, tmp_path / "memory").returncode == 0
    monkeypatch.setattr(run_module, "ImageStore", lambda: ImageStore(memory=0))
    assert select(*made, tmp_path / "disk").returncode == 0
    assert files_of(tmp_path / "memory") == files_of(tmp_path / "disk")


def test_a_finished_run_is_kept_and_another_refused(select, made, tmp_path):
    out = tmp_path / "out"
    assert select(*made, out).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    done = select(*made, out)
    assert done.returncode == 0
    assert "mean gap" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_one_line(select(*made, out, "--seed", 1), "selection.seed: 0 there, 1 here", "--overwrite")
    assert select(*made, out, "--seed", 1, "--overwrite").returncode == 0
    assert json.loads((out / "selection.json").read_text())["settings"]["seed"] == 1


def test_an_interrupted_run_is_finished_by_the_same_command(select, made, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_selection", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert select(*made, tmp_path / "out").returncode == 130
    assert not (tmp_path / "out" / "selection.json").exists()
    assert_one_line(select(*made, tmp_path / "out", "--label"), "an unfinished run", "selection.label")
    for name in ("out", "whole"):
        assert select(*made, tmp_path / name).returncode == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_on_an_object_store(select, made, tmp_path):
    """Any of fsspec's; this one is in memory."""
    store = fsspec.filesystem("memory")
    for folder in made:
        store.put(str(folder), f"/select/{folder.name}", recursive=True)
    urls = [f"memory://select/{name}" for name in ("candidates", "scores", "out")]
    for arguments in ((*made, tmp_path / "local"), urls):
        done = select(*arguments)
        assert done.returncode == 0, done.stderr
    store.get("/select/out", str(tmp_path / "copy"), recursive=True)
    local, copied = files_of(tmp_path / "local"), files_of(tmp_path / "copy")
    named = {"run.json", "selection.json", "rejected.parquet"}  # these name the candidates' place
    assert {name: copied[name] for name in copied.keys() - named} == {n: local[n] for n in local.keys() - named}
    assert copied.keys() == local.keys()


def test_files_of_other_origin_are_not_replaced(select, made, tmp_path):
    pairs = made[0] / "pairs.parquet"
    (made[0] / "candidates-000000.parquet").rename(pairs)
    (made[0] / "rejected.parquet").unlink()
    content = pairs.read_bytes()
    assert_one_line(select(*made, made[0], "--overwrite"), f"--out {made[0]} holds pairs.parquet")
    assert pairs.read_bytes() == content
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"job": "score"}')
    assert_one_line(select(*made, tmp_path / "other", "--overwrite"), "holds the output of `score`")


def test_rows_without_a_score_and_images_without_a_row(select, made, tmp_path):
    candidates, scores = made
    path = candidates / "candidates-000000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["prompt"] = "another prompt"
    rows[1] |= {"pair_id": "unknown"}
    rows[2]["prompt"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    done = select(candidates, scores, tmp_path / "out", *RAW)
    assert done.returncode == 0, done.stderr
    rejects = read_rejects(tmp_path / "out" / "rejected.parquet")
    assert [each.kind for each in rejects] == [
        *("other pair", "no score", "no prompt"),
        *("images missing", "images missing", "one image", "all equal"),
    ]
    assert rejects[0].source == f"{path}:0"
    assert list(rows_of(tmp_path / "out")) == ["two"]


def test_candidates_of_no_score_at_all(select, made, tmp_path):
    other = make_candidates(tmp_path / "other", {"a fox": [(0.0, 0.0), (1.0, 1.0)]})
    assert_one_line(
        select(made[0], other[1], tmp_path / "out"), "no prompt gives a pair: no score (7)", "images missing"
    )
    assert not (tmp_path / "out" / "pairs.parquet").exists()


@pytest.mark.parametrize(
    ("by", "flags", "parts"),
    [
        ("extrems", (), ("--by extrems: did you mean extremes?",)),
        ("extremes", ("--dominated-only",), ("--dominated-only has no effect with --by extremes", "--by pareto")),
        ("pareto", ("--loser", "random"), ("--loser has no effect", "--by ranking")),
        ("pareto", ("--judge", "nothing:Here"), ("--judge has no effect", "--by ranking")),
        ("ranking", ("--judge", "nothing"), ("--judge nothing: known: rewards, vlm",)),
        ("ranking", ("--judge", "nothing:Here"), ("--judge nothing:Here: nothing cannot be imported",)),
        ("extremes", ("--reward", "c"), ("--reward c: not in --scores", "a, b")),
        ("extremes", ("--reward", "a", "--reward-range", "b=raw"), ("--reward-range b: this reward is not used",)),
        ("extremes", ("--reward", "a:-1"), ("--reward a:-1",)),
        ("extremes", ("--min-gap", "2"), ("--min-gap",)),
    ],
)
def test_mistakes_are_one_line(select, made, tmp_path, by, flags, parts):
    done = select(*made, tmp_path / "out", *flags, by=by)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def test_inspect_shows_the_selection(select, capfd, tmp_path):
    def image(prompt: str, index: int) -> bytes:
        return encode(picture(seed=100 * list(PROMPTS).index(prompt) + index))

    made = make_candidates(tmp_path / "in", PROMPTS, image=image)
    assert select(*made, tmp_path / "out").returncode == 0
    scores = tmp_path / "out" / "scores"
    info = read_scores_info(scores)
    write_column(scores, info, "weight_0", np.ones(info.scored))  # not a reward
    sheet = tmp_path / "sheet.png"
    done = run_here(capfd, "smpo-pipeline", "inspect", tmp_path / "out", "--out", sheet)
    assert done.returncode == 0, done.stderr
    for words in ("selection by extremes", "mean gap", "one image", "all equal", f"contact sheet: {sheet}"):
        assert words in done.stdout
    with Image.open(sheet) as drawn:
        assert drawn.width > 1000
    done = run_here(capfd, "smpo-pipeline", "inspect", tmp_path / "out" / "selection.json", "--samples", 0)
    assert done.returncode == 0
    assert "contact sheet" not in done.stdout
