"""The next command that is printed at a command's end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from smpo_models.loading import load_family
from smpo_pipeline.options import ColumnOptions
from smpo_pipeline.terminal import print_next
from smpo_schemas.manifest import read_manifest
from tests.command import run_here
from tests.inspection.helpers import make_shards
from tests.tiny.stable_diffusion import make_tiny_model


def test_paths_are_quoted_and_nothing_is_wrapped_or_taken_for_markup():
    console = Console(record=True, width=20)
    print_next(console, "smpo-train", "--shards", Path("/a b/[red]c"), "--out", "runs/smpo")
    assert console.export_text() == "next: smpo-train --shards '/a b/[red]c' --out runs/smpo\n"


def test_chosen_columns_are_in_the_next_command():
    columns = ColumnOptions(prompt_column="text", image_0_column="left")
    assert columns.as_flags() == ["--prompt-column", "text", "--image-0-column", "left"]


def test_toy_prints_the_score_command(tmp_path, capfd):
    done = run_here(capfd, "smpo-pipeline", "toy", "--out", tmp_path / "world", "--pairs", "1")
    assert done.returncode == 0, done.stderr
    assert "1 pairs at 32 x 32 pixels; sd15; cpu, fp32; seed 0" in done.stdout
    rewards = f"pickscore={tmp_path / 'world' / 'rewards' / 'pickscore'}"
    flags = f"--pairs {tmp_path / 'world' / 'pairs'} --reward {rewards} --out {tmp_path / 'scores'}"
    assert f"next: smpo-pipeline score {flags}" in done.stdout


def test_invert_without_scores_prints_an_objective_that_learns_from_labels(tmp_path, capfd, monkeypatch):
    model = make_tiny_model(tmp_path / "model")
    shards = make_shards(tmp_path / "shards", model, load_family(str(model), ("vae",)))
    manifest = read_manifest(shards).model_copy(update={"rewards": {}})
    monkeypatch.setattr("smpo_pipeline.jobs.invert.job.invert", lambda _: manifest)
    given = ("--pairs", tmp_path, "--model", model, "--out", shards)
    done = run_here(capfd, "smpo-pipeline", "invert", *given)
    assert done.returncode == 0, done.stderr
    assert f"next: smpo-train --shards {shards} --model {model} --objective dpo --out runs/dpo" in done.stdout
