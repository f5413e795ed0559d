"""What is in an output of ``score``.

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
from smpo_schemas.rejects import Reject, read_rejects
from smpo_schemas.scores import REJECTS_FILE, ScoresInfo, read_scores, read_scores_info, reward_scores, table_labels

_MOST_ANNOTATORS = 10


@dataclass(frozen=True)
class ScoresSummary:
    """The table in memory.

    Attributes:
        info: ``scores.json``.
        scores: per reward float64 [P, 2].
        labels_P: P(image_0 preferred), NaN where nobody labelled.
        annotators: of each pair, "" where unnamed.
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
        UserError: unfinished or damaged.
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


def label_agreement(scores_P2: np.ndarray, labels_P: np.ndarray) -> tuple[int, int]:
    """How many decided labels a reward orders alike, and how many decided labels there are."""
    decided = ~np.isnan(labels_P) & (labels_P != TIE)
    alike = np.sign(scores_P2[:, 0] - scores_P2[:, 1]) == np.sign(labels_P - TIE)
    return int((alike & decided).sum()), int(decided.sum())


def reward_agreement(one_P2: np.ndarray, other_P2: np.ndarray) -> tuple[int, int]:
    """How many pairs two rewards order alike, and how many pairs neither of them ties."""
    one, other = (np.sign(scores[:, 0] - scores[:, 1]) for scores in (one_P2, other_P2))
    decided = (one != 0) & (other != 0)
    return int(((one == other) & decided).sum()), int(decided.sum())


def print_scores(summary: ScoresSummary, path: Path, console: Console) -> None:
    """Print what was found."""
    info = summary.info
    labels = summary.labels_P
    ties, unlabelled = int((labels == TIE).sum()), int(np.isnan(labels).sum())
    console.print(
        facts(
            f"scores: {path}",
            {
                "pairs": f"{info.scored + info.rejected} in = {info.scored} scored + {info.rejected} rejected",
                "labels": f"{len(labels) - ties - unlabelled} decided, {ties} ties, {unlabelled} without",
                "rewards": ", ".join(f"{name} ({reward.model})" for name, reward in info.rewards.items()),
            },
        )
    )
    table = make_table("rewards, over all images", ("reward", "unit", "min", "max", "mean", "std", "as labelled"), 2)
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
    """How sharp a preference each reward makes: p of the image that it prefers, from 0.5 (none) to 0.73."""
    rewards = {name: reward for name, reward in summary.info.rewards.items() if reward.max > reward.min}
    rows = {name: minmax(summary.scores, rewards, {name: 1.0}) for name in rewards}
    print_sharpness(rows, console)


def print_sharpness(p: dict[str, np.ndarray], console: Console) -> None:
    """Print the quantiles of P(preferred image preferred), per reward, from P(image_0 preferred) [P]."""
    title = "P(the image that a reward prefers); 0.5 is none"
    table = make_table(title, ("reward", *QUANTILE_NAMES))
    for name, p_P in p.items():
        table.add_row(name, *quantile_cells(np.maximum(p_P, 1 - p_P)))
    if p:
        console.print(table)


def _print_agreements(summary: ScoresSummary, console: Console) -> None:
    pairs = list(itertools.combinations(summary.scores, 2))
    if not pairs:
        return
    table = make_table("rewards that order a pair alike", ("reward", "reward", "pairs", "alike"), text_columns=2)
    for one, other in pairs:
        alike, decided = reward_agreement(summary.scores[one], summary.scores[other])
        table.add_row(one, other, f"{decided}", percent(alike, decided))
    console.print(table)


def _print_annotators(summary: ScoresSummary, console: Console) -> None:
    """Agreement of each reward with each of the annotators who labelled most."""
    names = np.array(summary.annotators)
    counts = Counter(name for name in summary.annotators if name)
    if not counts:
        return
    rewards: Sequence[str] = list(summary.scores)
    table = make_table("agreement with annotators", ("annotator", "decided labels", *rewards))
    for name, _ in counts.most_common(_MOST_ANNOTATORS):
        own = names == name
        found = [label_agreement(summary.scores[reward][own], summary.labels_P[own]) for reward in rewards]
        decided = found[0][1] if found else 0
        table.add_row(one_line(name), f"{decided}", *(percent(alike, total) for alike, total in found))
    console.print(table)
    if len(counts) > _MOST_ANNOTATORS:
        others = dict(counts.most_common()[_MOST_ANNOTATORS:])
        console.print(f"and {len(others)} more: {counted(others)}", highlight=False)
