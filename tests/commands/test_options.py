"""Mistakes in shared flags are reported before torch, Ray or a model is loaded."""

from __future__ import annotations

import sys

import pytest

from smpo_pipeline.rewards import _file_names, reward_classes
from tests.command import assert_one_line, run_here

HEAVY = (
    "smpo_pipeline.jobs.cluster.session",
    "smpo_pipeline.jobs.score.job",
    "smpo_pipeline.jobs.invert.job",
    "smpo_pipeline.evaluation.run",
    "smpo_pipeline.calibration",
    "smpo_pipeline.selection.run",
    "smpo_pipeline.refreshing.run",
    "smpo_pipeline.weighing.run",
)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run a command whose heavy imports fail, with valid flags updated by ``flags``."""
    for module in HEAVY:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    for name in ("pairs", "scores", "model", "clip"):
        (tmp_path / name).mkdir()
    for name in ("file", "prompts.txt"):
        (tmp_path / name).write_text("a cat")
    pairs = {"--pairs": "pairs", "--out": "out"}
    invert = pairs | {"--scores": "scores", "--model": "model"}
    right = {
        "score": pairs | {"--reward": "pickscore=clip"},
        "invert": invert,
        "plan": invert,
        "evaluate": {"--model": "a=model", "--prompts": "prompts.txt", "--reward": "pickscore=clip", "--out": "out"},
        "toy": {"--out": "out"},
        "calibrate": {"--scores": "scores"},
        "select": {"--candidates": "pairs", "--scores": "scores", "--by": "extremes", "--out": "out"},
        "refresh": pairs | {"--reward": "pickscore=clip", "--scores": "scores", "--candidates": "pairs"},
        "weigh": {"--pairs": "pairs", "--scores": "scores", "--golden-column": "golden"},
    }

    def run(command, flags):
        return run_here(
            capfd, "smpo-pipeline", command, *(each for flag in (right[command] | flags).items() for each in flag)
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("command", ["score", "evaluate", "refresh"])
@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("pickscor", "mean pickscore?"),
        ("toy_truth", "mean toy-truth?"),
        ("pickscore=", "="),
        ("pickscore,clipscore", "--reward pickscore clipscore"),
        ("pickscore:1", "smpo-train"),
        ("pickscore=1", "smpo-train"),
        ("pickscore=./nowhere/at/all", "no such folder"),
    ],
)
def test_an_unknown_reward_is_one_line(run, command, spec, hint):
    assert_one_line(run(command, {"--reward": spec}), f"--reward {spec}", hint)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("commands", "flag", "value"),
    [
        (("score", "invert", "plan", "weigh", "refresh"), "--pairs", "nowhere"),
        (("invert", "plan", "select"), "--scores", "nowhere"),
        (("select", "refresh"), "--candidates", "nowhere"),
        (("select",), "--by", "extrems"),
        (("select",), "--judge", "nothing"),
        (("invert", "plan"), "--model", "no/such/folder"),
        (("invert", "plan"), "--vae", "no/such/folder"),
        (("invert", "plan"), "--unet", "nowhere"),
        (("invert", "plan"), "--inverting-unet", "nowhere"),
        (("score", "select", "invert", "evaluate", "toy"), "--out", "file"),
        (("score", "invert", "evaluate", "toy"), "--out", "file/below"),
        (("score", "invert", "plan", "evaluate", "weigh"), "--device", "gpu"),
        (("weigh",), "--golden", "nowhere"),
        (("weigh", "refresh"), "--features", "hpsv2"),
        (("invert", "plan"), "--batch-size", "many"),
        (("plan",), "--json", "file/below.json"),
        (("plan",), "--json", "pairs"),
        (("calibrate",), "--out", "file/below.json"),
    ],
)
def test_missing_paths_and_bad_values_are_one_line(run, commands, flag, value):
    for command in commands:
        assert_one_line(run(command, {flag: value}), flag, value)


@pytest.mark.parametrize("command", ["score", "invert", "plan"])
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"--chosen-column": "a"}, ("--rejected-column is missing",)),
        ({"--rejected-column": "b"}, ("--chosen-column is missing",)),
        ({"--chosen-column": "a", "--rejected-column": "a"}, ("both name 'a'",)),
        ({"--chosen-column": "a", "--rejected-column": "b", "--image-0-column": "c"}, ("leave out --image-0-column",)),
        ({"--chosen-column": "a", "--rejected-column": "b", "--image-1-column": "c"}, ("leave out --image-1-column",)),
        ({"--chosen-column": "a", "--rejected-column": "b", "--label-column": "c"}, ("leave out --label-column",)),
    ],
)
def test_two_layouts_of_columns_at_once(run, command, flags, parts):
    assert_one_line(run(command, flags), "--chosen-column", "--rejected-column", *parts)


def test_a_file_on_the_hub_may_be_a_rewards_model(run):
    with pytest.raises(ImportError, match="job"):
        run("score", {"--reward": "hpsv2=owner/repository/file.pt"})


def test_valid_flags_reach_the_heavy_imports(run):
    for command in ("score", "select", "invert", "plan"):
        with pytest.raises(ImportError, match="job|session|selection"):
            run(command, {})


def test_rewards_have_the_names_of_their_files():
    assert _file_names() == set(reward_classes())
