"""CaPO's calibrated reward (arXiv 2502.02588): how often an image beats the other images of its prompt.

For the N images of a prompt, R_i = mean over j != i of sigmoid((r_i - r_j) / scale): the expected win rate against
samples for the same prompt. CaPO regresses the difference of a pair's implicit rewards on R_0 - R_1, so this
difference takes the place of SmPO's 2p - 1:

    p = (1 + R_0 - R_1) / 2,    for several rewards the mean of their p, by weights that are scaled to sum to 1.

With two images R_1 = 1 - R_0, and p is sigmoid((r_0 - r_1) / scale): a prompt with only one pair has the same p as
under ``minmax``, or with a calibration as under ``mixture``. The scale is max - min over the data set, the value of
``--reward-range`` (``raw``: 1, as in CaPO, whose rewards are log-odds), or a calibration's tau. (With several rewards
CaPO selects its pairs on the Pareto front; here the pairs are given.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np

from smpo_common.errors import UserError
from smpo_schemas.preference.base import Preference, ScoredPairs, sigmoid

_COMPARISONS_AT_ONCE = 1 << 20
"""Bounds the memory for a prompt with very many images."""


class WinRate(Preference):
    """Compares all images of a prompt; an image in several pairs counts once."""

    name: ClassVar[str] = "winrate"
    summary: ClassVar[str] = (
        "difference of the images' win rates against the other images of their prompt (CaPO); needs --scores"
    )
    calibration: ClassVar[Literal["refused", "optional", "required"]] = "optional"
    normalise_weights: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True

    def probability(self, pairs: ScoredPairs) -> np.ndarray:
        """See the base class; ``pairs`` must hold all pairs of a prompt.

        Raises:
            UserError: the images' hashes are unknown.
        """
        if pairs.prompts is None or pairs.images_P2 is None:
            raise UserError(
                "--preference winrate compares all images of a prompt, but these scores do not identify their images; "
                "run `smpo-pipeline score` again"
            )
        images = distinct_images(pairs.prompts, pairs.images_P2)
        difference_P = np.zeros(len(pairs.prompts))
        for name, weight in self.weights.items():
            scores_I = images.first_scores(pairs.scores[name]) / self.scales[name]
            rates_P2 = win_rates(scores_I, images.prompt_I)[images.image_P2]
            difference_P += weight * (rates_P2[:, 0] - rates_P2[:, 1])
        return (1 + difference_P) / 2


@dataclass(frozen=True)
class DistinctImages:
    """The I distinct images of P pairs, prompt by prompt; the images of a prompt are in the order of their hashes.

    Images are told apart per prompt: the same file has other scores under another prompt.

    Attributes:
        prompt_I: int64 [I], each image's prompt: prompts are numbered from 0 in the order of their first pair.
        image_P2: int64 [P, 2], the images of each pair.
        place_I: int64 [I], the image's first place in the flattened [P, 2].
    """

    prompt_I: np.ndarray
    image_P2: np.ndarray
    place_I: np.ndarray

    def first_scores(self, scores_P2: np.ndarray) -> np.ndarray:
        """Return each image's score, float64 [I], in the first pair that has the image."""
        return np.asarray(scores_P2, dtype=np.float64).reshape(-1)[self.place_I]

    def bounds(self) -> Iterator[tuple[int, int]]:
        """Yield the range of each prompt's images."""
        starts = np.flatnonzero(np.diff(self.prompt_I, prepend=-1))
        return pairwise([*starts.tolist(), len(self.prompt_I)])


def distinct_images(prompts: Sequence[str], images_P2: np.ndarray) -> DistinctImages:
    """Find the distinct images of each prompt.

    Args:
        prompts: one per pair.
        images_P2: str [P, 2], content hashes.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_P = np.array([numbers[prompt] for prompt in prompts], dtype=np.int64)
    _, name_P2 = np.unique(images_P2, return_inverse=True)
    keys = np.stack([np.repeat(prompt_P, 2), name_P2.reshape(-1)], axis=1)
    images, place_I, image_of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return DistinctImages(images[:, 0], image_of.reshape(-1, 2), place_I)


def win_rates(scores_I: np.ndarray, prompt_I: np.ndarray) -> np.ndarray:
    """Average sigmoid(score - other score) over the other images of the same prompt; 0.5 if there is none.

    Args:
        scores_I: float64 [I], in units of the scale.
        prompt_I: int [I], each image's prompt, sorted.
    """
    rates = np.full(len(scores_I), 0.5)
    starts = np.flatnonzero(np.diff(prompt_I, prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(scores_I)]):
        group = scores_I[start:stop]
        if len(group) == 1:
            continue
        rows = max(1, _COMPARISONS_AT_ONCE // len(group))
        for begin in range(0, len(group), rows):
            part = group[begin : begin + rows]
            # Subtract the comparison of each image with itself, which is 0.5.
            wins = sigmoid(part[:, None] - group[None, :]).sum(axis=1) - 0.5
            rates[start + begin : start + begin + len(part)] = wins / (len(group) - 1)
    return rates
