"""Read a scores table and check that its labels suffice for a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_schemas.label_file import read_labels, with_labels
from smpo_schemas.labels import TIE
from smpo_schemas.preference import ScoredPairs
from smpo_schemas.scoring.scores import (
    RewardStatistics,
    image_ids,
    read_scores,
    read_scores_info,
    reward_scores,
    table_labels,
    table_votes,
)


@dataclass(frozen=True)
class LabelledPairs:
    """All rows of a table; mixes that compare all images of a prompt need rows without a label too.

    Attributes:
        pairs: the rewards' scores, the prompts and the images' hashes.
        statistics: by reward name.
        labels_P: P(image_0 preferred), NaN without a label.
        votes_P: number of votes behind each label: 1 where the table does not say; 0 without a label.
        annotators: one per row, None if unnamed.
        pair_ids: one per row.
    """

    pairs: ScoredPairs
    statistics: Mapping[str, RewardStatistics]
    labels_P: np.ndarray
    votes_P: np.ndarray
    annotators: Sequence[str | None]
    pair_ids: Sequence[str]

    @property
    def prompts(self) -> Sequence[str]:
        """The prompt of each row."""
        return self.pairs.prompts or []

    @property
    def labelled(self) -> np.ndarray:
        """Whether each row has a label: bool [P]."""
        return ~np.isnan(self.labels_P)

    @property
    def decided(self) -> np.ndarray:
        """Whether each row has a label that is not a tie: bool [P]."""
        return self.labelled & (self.labels_P != TIE)


def read_labelled(directory: Path, rewards: Sequence[str], labels: AnyPath | None = None) -> LabelledPairs:
    """Read an output of ``score``.

    Args:
        directory: the output's folder.
        rewards: names of rewards; empty: all.
        labels: a file of votes, whose labels replace the table's.

    Raises:
        UserError: the output is unfinished, lacks a reward, or has no decided label.
    """
    info = read_scores_info(directory)
    for name in rewards:
        if name not in info.rewards:
            raise UserError(f"--reward {name}: {directory} has no such reward; it has: {', '.join(info.rewards)}")
    names = list(dict.fromkeys(rewards)) or list(info.rewards)
    table = read_scores(directory, info)
    if labels:
        votes = read_labels(labels)
        if votes.keys().isdisjoint(table["pair_id"].to_pylist()):
            raise UserError(f"--labels {labels}: none of its {len(votes)} pairs is in {directory}")
        table = with_labels(table, votes)
    labels_P, votes_P = table_labels(table), table_votes(table)
    data = LabelledPairs(
        pairs=ScoredPairs(
            {name: reward_scores(table, name) for name in names}, table["prompt"].to_pylist(), image_ids(table)
        ),
        statistics={name: info.rewards[name] for name in names},
        labels_P=labels_P,
        votes_P=np.where(np.isnan(labels_P), 0.0, np.where(np.isnan(votes_P), 1.0, votes_P)),
        annotators=table["annotator"].to_pylist(),
        pair_ids=table["pair_id"].to_pylist(),
    )
    if not data.labelled.any():
        raise UserError(
            f"{directory}: none of the {table.num_rows} pairs has a label; score pairs that people labelled "
            "(`smpo-pipeline score --label-column NAME` if the column has another name than `label`)"
        )
    if not data.decided.any():
        raise UserError(f"{directory}: all {int(data.labelled.sum())} labels are ties; calibrate needs decided labels")
    return data
