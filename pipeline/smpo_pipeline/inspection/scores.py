"""Describe an output of ``score``.

Shape suffixes: P pairs, 2 images of a pair.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from smpo_common.errors import one_line
from smpo_pipeline.inspection.pairs import print_rejects
from smpo_pipeline.terminal import QUANTILE_NAMES, counted, facts, make_table, percent, quantile_cells
from smpo_schemas.labels import TIE
from smpo_schemas.preference.minmax import minmax
from smpo_schemas.rejects import REJECTS_FILE, Reject, read_rejects
from smpo_schemas.scoring.scores import (
    ScoresInfo,
    label_agreement,
    read_scores,
    read_scores_info,
    reward_scores,
    table_labels,
)

_MAX_ANNOTATORS = 10


@dataclass(frozen=True)
class ScoresSummary:
    """The table in memory.

    Attributes:
        info: ``scores.json``.
        scores: per reward, float64 [P, 2].
        labels_P: P(image_0 preferred), NaN without a label.
        annotators: one per pair, "" if unnamed.
        rejects: pairs that could not be scored.
    """

    info: ScoresInfo
    scores: dict[str, np.ndarray]
    labels_P: np.ndarray
    annotators: list[str]
    rejects: list[Reject]


def summarise_scores(directory: Path) -> ScoresSummary:
    """Read the whole table (it holds no images).

    Raises:
        UserError: the output is unfinished or damaged.
    """
    info = read_scores_info(directory)
    table = read_scores(directory, info)
    rejects = read_rejects(directory / REJECTS_FILE) if (directory / REJECTS_FILE).is_file() else []
    return ScoresSummary(
        info=info,
        scores={name: reward_scores(table, name) for name in info.rewards},
        labels_P=table_labels(table),
        annotators=[name or "" for name in table["annotator"].to_pylist()],
        rejects=rejects,
    )


def reward_agreement(one_P2: np.ndarray, other_P2: np.ndarray) -> tuple[int, int]:
    """Count the pairs that two rewards order alike, and the pairs that neither of them ties."""
    one, other = (np.sign(scores[:, 0] - scores[:, 1]) for scores in (one_P2, other_P2))
    decided = (one != 0) & (other != 0)
    return int(((one == other) & decided).sum()), int(decided.sum())


def print_scores(summary: ScoresSummary, path: Path, console: Console) -> None:
    """Print the summary."""
    info = summary.info
    labels = summary.labels_P
    ties, unlabelled = int((labels == TIE).sum()), int(np.isnan(labels).sum())
    console.print(
        facts(
            f"scores: {path}",
            {
                "pairs": f"{info.scored + info.rejected} in = {info.scored} scored + {info.rejected} rejected",
                "labels": f"{len(labels) - ties - unlabelled} decided, {ties} ties; {unlabelled} pairs without a label",
                "rewards": ", ".join(f"{name} ({reward.model})" for name, reward in info.rewards.items()),
            },
        )
    )
    table = make_table("rewards, over all images", ("reward", "unit", "min", "max", "mean", "std", "fits labels"), 2)
    for name, reward in info.rewards.items():
        numbers = [f"{value:.4g}" for value in (reward.min, reward.max, reward.mean, reward.std)]
        agreement = "-" if reward.agreement is None else percent(reward.agreement, 1)
        table.add_row(name, reward.unit, *numbers, agreement)
    console.print(table)
    _print_preferences(summary, console)
    _print_agreements(summary, console)
    _print_annotators(summary, console)
    print_rejects(summary.rejects, console)


def _print_preferences(summary: ScoresSummary, console: Console) -> None:
    rewards = {name: reward for name, reward in summary.info.rewards.items() if reward.max > reward.min}
    print_sharpness({name: minmax(summary.scores, rewards, {name: 1.0}) for name in rewards}, console)


def print_sharpness(p: dict[str, np.ndarray], console: Console) -> None:
    """Print quantiles of the preferred image's p, per reward; under ``minmax`` p is from 0.5 to 0.73.

    Args:
        p: per reward, P(image_0 preferred), float [P].
        console: to print on.
    """
    title = "p of the preferred image, by reward (0.5: no preference)"
    table = make_table(title, ("reward", *QUANTILE_NAMES))
    for name, p_P in p.items():
        table.add_row(name, *quantile_cells(np.maximum(p_P, 1 - p_P)))
    if p:
        console.print(table)


def _print_agreements(summary: ScoresSummary, console: Console) -> None:
    pairs = list(itertools.combinations(summary.scores, 2))
    if not pairs:
        return
    table = make_table("agreement between rewards", ("reward", "reward", "pairs", "agree"), text_columns=2)
    for one, other in pairs:
        alike, decided = reward_agreement(summary.scores[one], summary.scores[other])
        table.add_row(one, other, f"{decided}", percent(alike, decided))
    console.print(table)


def _print_annotators(summary: ScoresSummary, console: Console) -> None:
    """Print each reward's agreement with the annotators who labelled most."""
    names = np.array(summary.annotators)
    counts = Counter(name for name in summary.annotators if name)
    if not counts:
        return
    rewards: Sequence[str] = list(summary.scores)
    table = make_table("agreement with annotators", ("annotator", "decided labels", *rewards))
    for name, _ in counts.most_common(_MAX_ANNOTATORS):
        own = names == name
        differences = (summary.scores[reward][own, 0] - summary.scores[reward][own, 1] for reward in rewards)
        agreements = [label_agreement(difference_P, summary.labels_P[own]) for difference_P in differences]
        decided = agreements[0][1] if agreements else 0
        table.add_row(one_line(name), f"{decided}", *(percent(alike, total) for alike, total in agreements))
    console.print(table)
    if len(counts) > _MAX_ANNOTATORS:
        others = dict(counts.most_common()[_MAX_ANNOTATORS:])
        console.print(f"and {len(others)} more: {counted(others)}", highlight=False)
