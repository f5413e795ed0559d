"""CaPO's target (arXiv 2502.02588) of selected pairs, by hand: the mean over rewards of R_0 - R_1."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from smpo_schemas.preference.winrate import WinRate
from smpo_schemas.scoring.scores import read_scores_info
from smpo_trainer.preference.preference_table import preference_table
from tests.command import run_here
from tests.selection.helpers import make_candidates


def test_the_target_counts_all_candidates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of three images, a's log-odds 2, 1, 0 give R = 0.80593, 0.5, 0.19407, and b's 2, 0, 1 the same, exchanged.

    Image 0 dominates the others, of which neither dominates the other: pairs (0, 1) and (0, 2), each with the target
    (0.30593 + 0.61186) / 2. Without the third image it would be (0.46212 + 0.76159) / 2.
    """
    made = make_candidates(tmp_path / "in", {"a cat": [(2, 2), (1, 0), (0, 1)]})
    out = tmp_path / "out"
    flags = ("--by", "pareto", "--pairs-per-prompt", 2, "--reward-range", "a=raw", "b=raw", "--out", out)
    done = run_here(capfd, "smpo-pipeline", "select", "--candidates", made[0], "--scores", made[1], *flags)
    assert done.returncode == 0, done.stderr
    info = read_scores_info(out / "scores")
    raw = {name: each.model_copy(update={"min": 0.0, "max": 1.0}) for name, each in info.rewards.items()}
    table = preference_table(out / "scores", info, WinRate({"a": 1, "b": 1}, raw), print)
    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    assert {row[f"noise_{1 - row['chosen_image']}"]["index"] for row in rows} == {1, 2}
    for row in rows:
        _, p = table.pairs[row["pair_id"]]
        sign = 1 if row["chosen_image"] == 0 else -1
        assert sign * (2 * p - 1) == pytest.approx(0.458895, abs=5e-6)
