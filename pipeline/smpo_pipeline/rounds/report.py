"""Compare the rounds' models: ``rounds.md``, with a table and links to each round's report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_pipeline.evaluation.comparison import Comparison, compare
from smpo_pipeline.evaluation.results import REPORT_FILE as EVALUATION_REPORT
from smpo_pipeline.evaluation.results import SCORES_FILE, Results, read_results
from smpo_pipeline.evaluation.summary import percent_interval, signed_interval
from smpo_pipeline.rounds.stages import BASE, Plan, round_name

REPORT_FILE = "rounds.md"

_HEAD = ("reward", "round", "mean", "gain over base (95 %)", "against base (95 %)", "against the one before (95 %)", "")


@dataclass(frozen=True)
class Versus:
    """A round's model under one reward.

    Attributes:
        mean: mean score of its images.
        base: comparison with the base.
        previous: comparison with the model of the round before; in round 0 with the base.
    """

    mean: float
    base: Comparison
    previous: Comparison


def read_versus(plan: Plan, number: int) -> dict[str, Versus]:
    """Compare a round's model with the base and the model before, by each reward of its evaluation.

    Raises:
        UserError: the evaluation is missing or unfinished.
    """
    folder = plan.folder(number) / "evaluation"
    results = read_results(folder)
    if results is None:
        raise UserError(f"{folder} holds no finished evaluation")
    name, before = round_name(number), round_name(number - 1) if number else BASE
    found = {}
    for reward in (entry.name for entry in results.rewards):
        scores = {model: _scores(plan, number, results, reward, model) for model in (name, before, BASE)}
        against = {model: compare(scores[name], scores[model]) for model in (before, BASE)}
        found[reward] = Versus(float(scores[name].mean()), against[BASE], against[before])
    return found


def _scores(plan: Plan, number: int, results: Results, reward: str, model: str) -> np.ndarray:
    """Read a model's scores: float64 [P, I], P prompts, I images per prompt."""
    path = plan.folder(number) / "evaluation" / SCORES_FILE
    table = pq.read_table(path, columns=[reward], filters=[("model", "=", model)])
    return table[reward].to_numpy().reshape(results.num_prompts, -1)


def table_rows(plan: Plan, last: int) -> list[tuple[str, ...]]:
    """Make the rows of the table of rounds 0 to ``last``, reward by reward."""
    rounds = [read_versus(plan, number) for number in range(last + 1)]
    rows: list[tuple[str, ...]] = []
    for reward in rounds[-1]:
        for number, versus in enumerate(rounds):
            found = versus[reward]
            rows.append(
                (
                    reward,
                    str(number),
                    f"{found.mean:.4g}",
                    signed_interval(found.base.mean_difference),
                    _win_rate(found.base),
                    _win_rate(found.previous),
                    f"[report]({round_name(number)}/evaluation/{EVALUATION_REPORT})",
                )
            )
    return rows


def _win_rate(found: Comparison) -> str:
    return f"{100 * found.win_rate.value:.1f} % ({percent_interval(found.win_rate)})"


def write_report(plan: Plan, last: int) -> None:
    """Write ``rounds.md`` about rounds 0 to ``last``."""
    lines = [_HEAD, ("---",) * len(_HEAD), *table_rows(plan, last)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    intro = (
        "Win rates of each round's model, of images of the same prompts from the same noise; 95 % intervals over "
        "prompts. The report of the last round compares all models with each other."
    )
    write_bytes(plan.options.out / REPORT_FILE, f"# Rounds\n\n{intro}\n\n{text}\n".encode())
