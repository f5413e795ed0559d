"""``smpo-pipeline calibrate`` as users run it, and ``smpo-train`` on what it writes."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.commands.pairs.calibrate import CalibrateOptions
from smpo_pipeline.commands.pairs.calibrate import calibrate as calibrate_command
from smpo_schemas.label_file import LABELS_SCHEMA
from smpo_schemas.scoring.calibration import Calibration, read_calibration
from tests.calibration.helpers import populations, write_scores
from tests.command import assert_one_line, run_here


@pytest.fixture
def scores(tmp_path):
    found, _, labels, prompts = populations(240)
    people = [None if row % 7 == 0 else f"person {row % 3}" for row in range(240)]
    return write_scores(tmp_path / "scores", found, labels, prompts, people)


def calibrate(capfd, *arguments):
    return run_here(capfd, "smpo-pipeline", "calibrate", *arguments)


@pytest.mark.slow
def test_the_calibration_is_written_and_printed(capfd, scores, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    done = calibrate(capfd, "--scores", scores)
    assert (done.returncode, done.stderr) == (0, "")
    found = read_calibration(scores / "calibration.json")
    for name, fit in found.held_out.items():
        assert f"{fit.log_loss:.4f}" in done.stdout, name
    assert "228 decided, 12 ties" in done.stdout
    assert "rewards: all of them; 5 folds of the prompts; seed 0" in done.stdout
    assert f"--preference mixture --calibration {scores / 'calibration.json'} --out" in done.stdout
    assert "person 1" in done.stdout
    assert "no pair was labelled more than once" in done.stdout
    assert f"{found.rewards['one'].tau:.4g}" in done.stdout
    with Image.open(scores / "calibration.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.slow
def test_equal_runs_write_equal_bytes(capfd, scores, tmp_path):
    for name in ("a", "b"):
        calibrate(capfd, "--scores", scores, "--out", tmp_path / name / "c.json", "--folds", 3, "--seed", 5)
    for suffix in (".json", ".png"):
        one, other = ((tmp_path / name / f"c{suffix}").read_bytes() for name in ("a", "b"))
        assert one == other
    assert read_calibration(tmp_path / "a" / "c.json").folds == 3


@pytest.mark.slow
def test_votes_of_a_file_replace_the_tables_labels(capfd, scores, tmp_path):
    def write_votes(name, pair_ids):
        path = tmp_path / name
        rows = [{"pair_id": pair_id, "label": 1.0, "annotator": "ann", "time": None} for pair_id in pair_ids]
        pq.write_table(pa.Table.from_pylist(rows, LABELS_SCHEMA), path)
        return path

    ties = write_votes("ties.parquet", [f"pair-{row}" for row in range(0, 240, 20)])  # the table has ties there
    done = calibrate(capfd, "--scores", scores, "--labels", ties, "--folds", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "240 decided, 0 ties" in done.stdout
    others = write_votes("others.parquet", ["elsewhere"])
    assert_one_line(calibrate(capfd, "--scores", scores, "--labels", others), "none of its 1 pairs is in")


@pytest.mark.slow
def test_people_who_agree_are_shown(capfd, tmp_path):
    found, _, labels, prompts = populations(60)
    twice = {name: np.concatenate([each, each]) for name, each in found.items()}
    ids = [f"p{row}" for row in range(60)] * 2
    people = ["ann"] * 60 + ["bob"] * 60
    folder = write_scores(tmp_path / "scores", twice, labels * 2, prompts * 2, people, pair_ids=ids)
    done = calibrate(capfd, "--scores", folder)
    assert "60 pairs were labelled more than once" in done.stdout
    assert "100.0 % of 57 repeated decided labels agree; 3 with a tie" in done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_that_are_markup_formulas_or_long_are_shown_as_they_are(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    found, _, labels, prompts = populations(120)
    people = ["[/x]", "a$b$c$", "$\\frac$", "[bold]b", ":cat:\n\x1b[31m" + "w" * 300]
    folder = write_scores(tmp_path / "s", found, labels, prompts, [people[row % len(people)] for row in range(120)])
    info = json.loads((folder / "scores.json").read_text())
    info["rewards"]["one"]["unit"] = "steps [/of] $x$"
    (folder / "scores.json").write_text(json.dumps(info))
    done = calibrate(capfd, "--scores", folder)
    assert (done.returncode, done.stderr) == (0, "")
    for shown in (*people[:4], ":cat:", "steps [/of] $x$"):
        assert shown in done.stdout
    assert "\x1b" not in done.stdout
    assert (folder / "calibration.png").is_file()


def test_the_calibration_is_written_before_its_picture(scores, monkeypatch):
    def fails(*_):
        raise RuntimeError("no picture")

    monkeypatch.setattr("smpo_pipeline.calibration.plot.save_plot", fails)
    with pytest.raises(RuntimeError, match="no picture"):
        calibrate_command(CalibrateOptions(scores=scores))
    assert read_calibration(scores / "calibration.json").folds == 5


def test_mistakes_are_one_line(capfd, scores, tmp_path):
    found, _, labels, prompts = populations(20)
    none = write_scores(tmp_path / "none", found, [None] * 20, prompts)
    ties = write_scores(tmp_path / "ties", found, [0.5] * 20, prompts)
    one = write_scores(tmp_path / "one", found, labels, ["the same"] * 20)
    same = write_scores(tmp_path / "same", {"flat": np.tile(np.arange(20.0)[:, None], 2)}, labels, prompts)
    constant = write_scores(tmp_path / "constant", {"flat": np.ones((20, 2))}, labels, prompts)
    lone = [0.5] * 19 + [1.0]
    lonely = write_scores(tmp_path / "lonely", found, lone, [f"p{row}" for row in range(20)])
    assert_one_line(calibrate(capfd, "--scores", tmp_path / "nothing"), "no scores.json")
    assert_one_line(calibrate(capfd, "--scores", none), "none of the 20 pairs has a label")
    assert_one_line(calibrate(capfd, "--scores", ties), "all 20 labels are ties")
    assert_one_line(calibrate(capfd, "--scores", one), "--folds 5")
    assert_one_line(calibrate(capfd, "--scores", same), "reward flat gives both images the same score in all 20")
    assert_one_line(calibrate(capfd, "--scores", constant), "all images have the score 1.0")
    assert_one_line(calibrate(capfd, "--scores", lonely), "all labels are ties: too few decided labels for --folds 5")
    assert_one_line(calibrate(capfd, "--scores", scores, "--reward", "three"), "--reward three", "one, two")


def test_out_over_the_scores_and_urls_are_one_line(capfd, scores):
    before = {path: path.read_bytes() for path in scores.iterdir()}
    for name in ("scores.json", "calibration.png", "calibration"):
        assert_one_line(calibrate(capfd, "--scores", scores, "--out", scores / name), "--out", name, "ends in .json")
    assert_one_line(calibrate(capfd, "--scores", "s3://bucket/scores"), "s3://bucket/scores is a URL", "download it")
    assert {path: path.read_bytes() for path in scores.iterdir()} == before


@pytest.mark.slow
def test_a_damaged_file_is_one_line(capfd, scores):
    calibrate(capfd, "--scores", scores)
    path = scores / "calibration.json"
    value = json.loads(path.read_text())
    value["rewards"]["one"]["weight"] += 0.1
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="malformed: .*the weights sum to 1.1"):
        read_calibration(path)
    path.write_text(json.dumps({**value, "schema_version": 9}))
    with pytest.raises(UserError, match="schema version 9, this program reads 1; calibrate again"):
        read_calibration(path)
    with pytest.raises(UserError, match="is a folder; name the calibration.json in it"):
        read_calibration(scores)
    assert Calibration.model_fields.keys() == value.keys()
