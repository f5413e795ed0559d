"""Preferences from an output of ``smpo-pipeline score``, in place of the scores in the shards (``--scores``)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_schemas.preference import Preference, ScoredPairs
from smpo_schemas.scoring.scores import (
    ScoresInfo,
    image_ids,
    read_scores,
    reward_scores,
    score_tolerance,
    table_labels,
    table_votes,
)
from smpo_schemas.shards.samples import SampleMeta

_MAX_CHARACTERS = 60
"""Characters of a prompt in an error."""


@dataclass(frozen=True)
class PreferenceTable:
    """P(image_0 preferred) of each pair in an output of ``score``.

    Attributes:
        folder: the output of ``score``.
        sha256: hash of everything that determines p.
        pairs: prompt and p by pair_id.
    """

    folder: Path
    sha256: str
    pairs: Mapping[str, tuple[str, float]]

    def preference(self, meta: SampleMeta) -> float:
        """Return p of a trajectory's pair; NaN if the table lacks it.

        Raises:
            UserError: the table has another prompt for this pair.
        """
        if meta.pair_id not in self.pairs:
            return np.nan
        prompt, p = self.pairs[meta.pair_id]
        require_same_prompt(self.folder, prompt, meta)
        return p


def require_same_prompt(scores: Path, prompt: str | None, meta: SampleMeta) -> None:
    """Check that a pair has the same prompt in table and shards.

    Raises:
        UserError: it has not.
    """
    # Different data sets may use the same pair_ids.
    if prompt != meta.prompt:
        raise UserError(
            f"--scores {scores} and --shards hold different pairs: the prompt of pair {meta.pair_id} is "
            f"{_short(prompt)} in the scores and {_short(meta.prompt)} in the shards; score the pairs that were "
            "inverted"
        )


def preference_table(
    folder: Path, info: ScoresInfo, preference: Preference, say: Callable[[str], None]
) -> PreferenceTable:
    """Compute p of every pair of the table. Rows that repeat a pair, with labels of other annotators, count once.

    Args:
        folder: output of ``score``.
        info: its ``scores.json``.
        preference: how rewards are mixed.
        say: prints a line about repeated rows.

    Raises:
        UserError: rows with the same pair_id hold different pairs.
    """
    table = read_scores(folder, info)
    ids, prompts = table["pair_id"].to_pylist(), table["prompt"].to_pylist()
    scores = {name: reward_scores(table, name) for name in preference.weights}
    scored = ScoredPairs(scores, prompts, image_ids(table) if preference.needs_images else None)
    if preference.uses_labels:
        labels_P, votes_P = pooled_votes(ids, table_labels(table), table_votes(table))
        scored = replace(scored, labels_P=labels_P, votes_P=votes_P)
    p_P = preference.probability(scored)
    allowed = {name: score_tolerance(info.rewards[name]) for name in scores}
    first: dict[str, int] = {}
    for row, pair_id in enumerate(ids):
        other = first.setdefault(pair_id, row)
        if other == row:
            continue
        # Scores of the same images in different batches may differ by rounding.
        unequal = [name for name, s_P2 in scores.items() if abs(s_P2[row] - s_P2[other]).max() > allowed[name]]
        if prompts[row] != prompts[other] or unequal:
            what = f"scores of {unequal[0]}" if unequal else "prompts"
            raise UserError(
                f"--scores {folder}: different pairs have the pair_id {pair_id} (rows {other} and {row} have different "
                f"{what}); score again with another --pair-id-column, or without it"
            )
    if len(first) < len(ids):
        used = "their votes count together" if preference.uses_labels else "the first row of each pair is used"
        say(f"{len(ids) - len(first)} of {len(ids)} rows of {folder} repeat a pair; {used}")
    pairs = {pair_id: (prompts[row], float(p_P[row])) for pair_id, row in first.items()}
    return PreferenceTable(folder, _sha256(ids, scored, preference), pairs)


def pooled_votes(pair_ids: Sequence[str], labels_P: np.ndarray, votes_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's share and number of all votes on its pair: float64 [P] each, NaN without a label.

    Args:
        pair_ids: one per row; rows with the same id, labels by several people, are the same pair.
        labels_P: share of the row's votes for image_0; NaN without a label.
        votes_P: number of the row's votes; NaN where unknown, which is one.
    """
    labelled = ~np.isnan(labels_P)
    votes = np.where(labelled, np.where(np.isnan(votes_P), 1.0, votes_P), 0.0)
    _, pair_P = np.unique(np.array(pair_ids, dtype=object), return_inverse=True)
    of_pair = np.bincount(pair_P, votes)
    for_first = np.bincount(pair_P, votes * np.where(labelled, labels_P, 0.0))
    with np.errstate(invalid="ignore"):
        return (for_first / of_pair)[pair_P], np.where(of_pair > 0, of_pair, np.nan)[pair_P]


def _sha256(ids: Sequence[str], scored: ScoredPairs, preference: Preference) -> str:
    # Hash what determines p, not p itself, whose last bit differs between processors.
    images = None if scored.images_P2 is None else scored.images_P2.tolist()
    inputs = {"pair_id": ids, "prompt": scored.prompts, "image_ids": images, "scale": dict(preference.scales)}
    digest = hashlib.sha256(sha256_json(inputs).encode())
    for name in sorted(scored.scores):
        digest.update(scored.scores[name].tobytes())
    if scored.labels_P is not None and scored.votes_P is not None:
        digest.update(sha256_json(preference.strength).encode())
        digest.update(scored.labels_P.tobytes() + scored.votes_P.tobytes())
    return digest.hexdigest()


def _short(prompt: str | None) -> str:
    return repr(prompt if prompt is None or len(prompt) <= _MAX_CHARACTERS else prompt[:_MAX_CHARACTERS] + "...")
