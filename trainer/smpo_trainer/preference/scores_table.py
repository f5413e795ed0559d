"""P(image_0 preferred) of the pairs of an output of ``score``, which a run may use in place of its shards' scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_schemas.preference import Preference, ScoredPairs
from smpo_schemas.scores import ScoresInfo, image_ids, read_scores, reward_scores, score_tolerance
from smpo_schemas.shards.samples import SampleMeta

_LONGEST = 60
"""Characters of a prompt in an error."""


@dataclass(frozen=True)
class PreferenceTable:
    """P(image_0 preferred) of the pairs of an output of ``score``.

    Attributes:
        folder: the output of ``score``.
        sha256: of everything that p was made of.
        pairs: prompt and p by pair_id.
    """

    folder: Path
    sha256: str
    pairs: Mapping[str, tuple[str, float]]

    def preference(self, meta: SampleMeta) -> float:
        """P of a trajectory's pair; NaN where the table lacks it.

        Raises:
            UserError: the table has another prompt for this pair.
        """
        if meta.pair_id not in self.pairs:
            return np.nan
        prompt, p = self.pairs[meta.pair_id]
        require_same_prompt(self.folder, prompt, meta)
        return p


def require_same_prompt(scores: Path, prompt: str | None, meta: SampleMeta) -> None:
    """Refuse a trajectory whose pair has another prompt in the table: pair_ids of two data sets may be alike.

    Raises:
        UserError: it has.
    """
    if prompt != meta.prompt:
        raise UserError(
            f"--scores {scores} and the shards are of different pairs: the prompt of pair {meta.pair_id} is "
            f"{_short(prompt)} there and {_short(meta.prompt)} in the shards; score the pairs that were inverted"
        )


def preference_table(
    folder: Path, info: ScoresInfo, preference: Preference, say: Callable[[str], None]
) -> PreferenceTable:
    """P of every pair of the table. Rows that repeat a pair (other annotators' labels) count once.

    Args:
        folder: output of ``score``.
        info: its ``scores.json``.
        preference: how rewards are mixed.
        say: takes a line about repeated rows.

    Raises:
        UserError: rows of one pair_id are of different pairs.
    """
    table = read_scores(folder, info)
    ids, prompts = table["pair_id"].to_pylist(), table["prompt"].to_pylist()
    scores = {name: reward_scores(table, name) for name in preference.weights}
    scored = ScoredPairs(scores, prompts, image_ids(table) if preference.needs_images else None)
    p_P = preference.probability(scored)
    allowed = {name: score_tolerance(info.rewards[name]) for name in scores}
    first: dict[str, int] = {}
    for row, pair_id in enumerate(ids):
        other = first.setdefault(pair_id, row)
        if other == row:
            continue
        apart = [name for name, each_P2 in scores.items() if abs(each_P2[row] - each_P2[other]).max() > allowed[name]]
        if prompts[row] != prompts[other] or apart:
            what = f"scores of {apart[0]}" if apart else "prompts"
            raise UserError(
                f"--scores {folder}: pair_id {pair_id} stands for different pairs (rows {other} and {row} have "
                f"different {what}); score with another --pair-id-column, or with none"
            )
    if len(first) < len(ids):
        say(f"{len(ids) - len(first)} of {len(ids)} rows of {folder} repeat a pair; the first of each counts")
    pairs = {pair_id: (prompts[row], float(p_P[row])) for pair_id, row in first.items()}
    return PreferenceTable(folder, _sha256(ids, scored, preference), pairs)


def _sha256(ids: Sequence[str], scored: ScoredPairs, preference: Preference) -> str:
    """Hash of what p is made of, rather than of p, whose last bit differs between processors."""
    images = None if scored.images_P2 is None else scored.images_P2.tolist()
    words = {"pair_id": ids, "prompt": scored.prompts, "image_ids": images, "scale": dict(preference.scales)}
    digest = hashlib.sha256(sha256_json(words).encode())
    for name in sorted(scored.scores):
        digest.update(scored.scores[name].tobytes())
    return digest.hexdigest()


def _short(prompt: str | None) -> str:
    return repr(prompt if prompt is None or len(prompt) <= _LONGEST else prompt[:_LONGEST] + "...")
