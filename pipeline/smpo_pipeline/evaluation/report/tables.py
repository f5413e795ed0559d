"""Every model against every other, over all prompts and within each category; and the same as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from smpo_pipeline.evaluation.comparison import Comparison, Estimate, compare_differences
from smpo_pipeline.evaluation.results import Results

Scores = Mapping[str, Mapping[str, np.ndarray]]
"""Per reward and model, float [P, I]: P prompts, I images per prompt."""


@dataclass(frozen=True)
class Matrix:
    """Every model against every other over some prompts.

    Attributes:
        category: of the prompts; None: all prompts.
        num_prompts: their number.
        cells: per reward, model and other model, the comparison of the model with the other one.
    """

    category: str | None
    num_prompts: int
    cells: Mapping[tuple[str, str, str], Comparison]


def compare_models(scores: Scores, prompts: Sequence[int], category: str | None = None) -> Matrix:
    """Compare every model with every other on some prompts, given by their numbers."""
    models = list(next(iter(scores.values())))
    keys = [(reward, *pair) for reward in scores for pair in combinations(models, 2)]
    chosen = list(prompts)
    differences = [scores[reward][first][chosen] - scores[reward][second][chosen] for reward, first, second in keys]
    cells: dict[tuple[str, str, str], Comparison] = {}
    if keys:
        for (reward, first, second), comparison in zip(keys, compare_differences(differences), strict=True):
            cells[reward, first, second] = comparison
            cells[reward, second, first] = comparison.reversed()
    return Matrix(category, len(chosen), cells)


def compare_by_category(results: Results, scores: Scores) -> list[Matrix]:
    """Compare the models within each category, in the order in which the prompts first name them."""
    categories = results.settings.categories or []
    return [
        compare_models(scores, [number for number, each in enumerate(categories) if each == category], category)
        for category in dict.fromkeys(categories)
        if category
    ]


def win_rates_csv(results: Results, matrices: Iterable[Matrix]) -> str:
    """Write one row per comparison; ``category`` is empty for all prompts, bounds are empty for a single prompt."""
    header = ["category", "prompts", "reward", "model", "against", "training", "verdict", "won", "tied", "lost"]
    header += ["win_rate", "win_rate_low", "win_rate_high", "difference", "difference_low", "difference_high"]
    rows: list[list[Any]] = [header]
    entries = {model.name: model for model in results.models}
    for matrix in matrices:
        for (reward, model, other), found in sorted_cells(results, matrix):
            row = [matrix.category or "", matrix.num_prompts, reward, model, other, entries[model].standing(reward)]
            row += [found.verdict, found.wins, found.ties, found.losses]
            rows.append([*row, *_numbers(found.win_rate), *_numbers(found.mean_difference)])
    return _csv(rows)


def sorted_cells(results: Results, matrix: Matrix) -> list[tuple[tuple[str, str, str], Comparison]]:
    """List a matrix's cells by reward, model and other model, each in the order of the results."""
    names = [model.name for model in results.models]
    keys = [(reward.name, model, other) for reward in results.rewards for model in names for other in names]
    return [(key, matrix.cells[key]) for key in keys if key in matrix.cells]


def prompts_csv(results: Results, scores: Scores) -> str:
    """Write each prompt's mean score of every model under every reward, a row per prompt."""
    settings = results.settings
    categories = settings.categories or [""] * results.num_prompts
    means = {
        f"{reward} of {model}": values.mean(axis=1) for reward, by in scores.items() for model, values in by.items()
    }
    rows: list[list[Any]] = [["prompt_index", "prompt", "category", *means]]
    for number, (prompt, category) in enumerate(zip(settings.prompts, categories, strict=True)):
        rows.append([number, prompt, category, *(f"{mean[number]:.6g}" for mean in means.values())])
    return _csv(rows)


def _numbers(estimate: Estimate) -> list[str]:
    bounds = (estimate.value, estimate.low, estimate.high)
    return ["" if value is None else f"{value:.6g}" for value in bounds]


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
