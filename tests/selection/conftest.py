from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import run_here
from tests.selection.helpers import PROMPTS, make_candidates


@pytest.fixture
def select(capfd):
    """Run ``select``; return its exit status and output."""

    def run(candidates: Path, scores: Path, out: Path, *flags: object, by: str = "extremes"):
        inputs = ("--candidates", candidates, "--scores", scores, "--by", by, "--out", out)
        return run_here(capfd, "smpo-pipeline", "select", *inputs, *flags)

    return run


@pytest.fixture
def made(tmp_path) -> tuple[Path, Path]:
    return make_candidates(tmp_path / "in", PROMPTS)
