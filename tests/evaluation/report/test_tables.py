"""Comparisons between all models, within categories, and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from smpo_pipeline.evaluation.comparison import Comparison, Estimate, compare
from smpo_pipeline.evaluation.report.figure import draw_win_rates
from smpo_pipeline.evaluation.report.tables import compare_by_category, compare_models
from tests.evaluation.report.made import CATEGORIES, MODELS, REWARDS, Made, make_report


def comparison(low: float | None, high: float | None) -> Comparison:
    return Comparison(Estimate(0.5, low, high), Estimate(0.0, None, None), wins=0, ties=0, losses=0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.51, 0.7, "better"),
        (0.3, 0.49, "worse"),
        (0.5, 0.7, "undecided"),
        (0.5 + 1e-16, 0.7, "undecided"),  # the rounding of a sum
        (0.3, 0.5, "undecided"),
        (None, None, "undecided"),
    ],
)
def test_verdict_is_whether_the_interval_excludes_half(low: float | None, high: float | None, verdict: str) -> None:
    assert comparison(low, high).verdict == verdict
    assert comparison(low, high).reversed().verdict == {"better": "worse", "worse": "better"}.get(verdict, verdict)


def test_every_pair_of_models_by_hand() -> None:
    one, two = np.array([[1.0, 2.0], [3.0, 3.0]]), np.array([[0.0, 2.0], [4.0, 0.0]])
    cells = compare_models({"r": {"one": one, "two": two}}, range(2)).cells
    assert set(cells) == {("r", "one", "two"), ("r", "two", "one")}
    assert cells["r", "one", "two"].win_rate.value == (1 + 0.5 + 0 + 1) / 4
    assert cells["r", "two", "one"].win_rate.value == 1.5 / 4
    assert cells["r", "two", "one"].mean_difference.value == pytest.approx((-1 + 0 + 1 - 3) / 4)
    assert (cells["r", "two", "one"].wins, cells["r", "two", "one"].ties, cells["r", "two", "one"].losses) == (1, 1, 2)


@pytest.mark.slow
def test_the_matrix_agrees_with_comparisons_one_by_one(made: Made) -> None:
    """In both directions: an interval of the other model against this one is this one's, reflected."""
    cells = compare_models(made.scores, range(45)).cells
    assert len(cells) == len(REWARDS) * 4 * 3
    for (reward, model, other), found in cells.items():
        alone = compare(made.scores[reward][model], made.scores[reward][other])
        assert (found.wins, found.ties, found.losses) == (alone.wins, alone.ties, alone.losses)
        for mine, theirs in ((found.win_rate, alone.win_rate), (found.mean_difference, alone.mean_difference)):
            assert [mine.value, mine.low, mine.high] == pytest.approx([theirs.value, theirs.low, theirs.high], abs=0.01)
    assert cells["pickscore", "smpo", "base"].verdict == "better"
    assert cells["pickscore", "base", "smpo"].verdict == "worse"


def test_a_category_has_its_own_prompts(made: Made) -> None:
    animals, food = compare_by_category(made.results, made.scores)
    assert (animals.category, food.category) == CATEGORIES[:2]  # the prompts without one are in none
    assert animals.num_prompts == food.num_prompts == 15
    alone = compare(made.scores["hpsv2"]["dpo"][1::3], made.scores["hpsv2"]["base"][1::3])
    found = food.cells["hpsv2", "dpo", "base"]
    assert found.win_rate.value == pytest.approx(alone.win_rate.value)
    assert (found.wins, found.losses) == (alone.wins, alone.losses)


def test_tables_to_take_away(made: Made) -> None:
    folder = made.path.parent
    rows = list(csv.DictReader(io.StringIO((folder / "win_rates.csv").read_text())))
    assert len(rows) == 3 * len(REWARDS) * 4 * 3  # all prompts and two categories
    (row,) = [
        each
        for each in rows
        if (each["category"], each["reward"], each["model"], each["against"]) == ("", "hpsv2", "smpo", "base")
    ]
    versus = made.results.finding("smpo", "hpsv2").versus_baseline
    assert float(row["win_rate"]) == pytest.approx(versus.win_rate.value)
    assert float(row["win_rate_low"]) == pytest.approx(versus.win_rate.low)
    assert (row["verdict"], row["training"]) == ("better", "held out")
    assert (row["prompts"], row["won"]) == ("45", str(versus.wins))
    prompts = list(csv.DictReader(io.StringIO((folder / "prompts.csv").read_text())))
    assert [each["prompt"] for each in prompts] == made.results.settings.prompts
    assert float(prompts[7]["pickscore of dpo"]) == pytest.approx(made.scores["pickscore"]["dpo"][7].mean(), rel=1e-5)
    assert prompts[7]["category"] == CATEGORIES[1]


def test_figure_to_take_away(made: Made) -> None:
    """Equal results give equal bytes."""
    content = (made.path.parent / "win_rates.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert draw_win_rates(made.results) == content


def test_a_single_model_and_a_single_prompt_have_a_report(tmp_path: Path) -> None:
    for number, (models, prompts) in enumerate(((MODELS[:1], 3), (MODELS[:2], 2))):
        (folder := tmp_path / str(number)).mkdir()
        page = make_report(folder, models=models, prompts=prompts, images=1, categories=False).path.read_text()
        assert 'id="matrix"' not in page
        assert 'id="categories"' not in page
