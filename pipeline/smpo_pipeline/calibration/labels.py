"""A scores table and its labels, checked to be enough to calibrate by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smpo_common.errors import UserError
from smpo_schemas.labels import TIE
from smpo_schemas.preference import ScoredPairs
from smpo_schemas.scores import (
    RewardStatistics,
    image_ids,
    read_scores,
    read_scores_info,
    reward_scores,
    table_labels,
)


@dataclass(frozen=True)
class LabelledPairs:
    """All rows of a table: those without a label still tell which images a prompt has.

    Attributes:
        pairs: the rewards' scores, prompts and names of the images.
        statistics: by reward name.
        labels_P: P(image_0 preferred), NaN where nobody labelled.
        annotators: of each row, None where unnamed.
        pair_ids: of each row.
    """

    pairs: ScoredPairs
    statistics: Mapping[str, RewardStatistics]
    labels_P: np.ndarray
    annotators: Sequence[str | None]
    pair_ids: Sequence[str]

    @property
    def prompts(self) -> Sequence[str]:
        """Of each row."""
        return self.pairs.prompts or []

    @property
    def labelled(self) -> np.ndarray:
        """Which rows have a label: bool [P]."""
        return ~np.isnan(self.labels_P)

    @property
    def decided(self) -> np.ndarray:
        """Which rows have a label that is no tie: bool [P]."""
        return self.labelled & (self.labels_P != TIE)


def read_labelled(directory: Path, rewards: Sequence[str]) -> LabelledPairs:
    """Read an output of ``score``.

    Args:
        directory: the output.
        rewards: which rewards to read; empty: all.

    Raises:
        UserError: it is no finished output, a reward is not in it, or no label says which image is better.
    """
    info = read_scores_info(directory)
    for name in rewards:
        if name not in info.rewards:
            raise UserError(f"--reward {name}: {directory} holds no such reward; it holds: {', '.join(info.rewards)}")
    names = list(dict.fromkeys(rewards)) or list(info.rewards)
    table = read_scores(directory, info)
    found = LabelledPairs(
        pairs=ScoredPairs(
            {name: reward_scores(table, name) for name in names}, table["prompt"].to_pylist(), image_ids(table)
        ),
        statistics={name: info.rewards[name] for name in names},
        labels_P=table_labels(table),
        annotators=table["annotator"].to_pylist(),
        pair_ids=table["pair_id"].to_pylist(),
    )
    if not found.labelled.any():
        raise UserError(
            f"{directory}: none of the {table.num_rows} pairs has a label, and rewards are calibrated by people's "
            "labels; score pairs that have them (`score --label-column NAME` where the column is not known)"
        )
    if not found.decided.any():
        raise UserError(f"{directory}: all {int(found.labelled.sum())} labels are ties, which prefer no image")
    return found
