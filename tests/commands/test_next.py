"""The next command that is printed at a command's end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from smpo_pipeline.options import ColumnOptions
from smpo_pipeline.terminal import print_next
from tests.command import run_here


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
