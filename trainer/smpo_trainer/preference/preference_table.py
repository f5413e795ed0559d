"""Preferences from an output of ``smpo-pipeline score``, in place of the scores in the shards (``--scores``)."""

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
        say(f"{len(ids) - len(first)} of {len(ids)} rows of {folder} repeat a pair; the first row of each pair is used")
    pairs = {pair_id: (prompts[row], float(p_P[row])) for pair_id, row in first.items()}
    return PreferenceTable(folder, _sha256(ids, scored, preference), pairs)


def _sha256(ids: Sequence[str], scored: ScoredPairs, preference: Preference) -> str:
    # Hash what determines p, not p itself, whose last bit differs between processors.
    images = None if scored.images_P2 is None else scored.images_P2.tolist()
    inputs = {"pair_id": ids, "prompt": scored.prompts, "image_ids": images, "scale": dict(preference.scales)}
    digest = hashlib.sha256(sha256_json(inputs).encode())
    for name in sorted(scored.scores):
        digest.update(scored.scores[name].tobytes())
    return digest.hexdigest()


def _short(prompt: str | None) -> str:
    return repr(prompt if prompt is None or len(prompt) <= _MAX_CHARACTERS else prompt[:_MAX_CHARACTERS] + "...")
