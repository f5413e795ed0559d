"""The interface of a reward mix.

Shape suffixes: P pairs, 2 images of a pair, K rewards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from smpo_common.errors import UserError
from smpo_schemas.scoring.calibration import Calibration
from smpo_schemas.scoring.scores import RewardStatistics


@dataclass(frozen=True)
class ScoredPairs:
    """P pairs and their scores.

    Attributes:
        scores: per reward, float [P, 2], raw scores of image_0 and image_1.
        prompts: one per pair; None where unknown.
        images_P2: str [P, 2], content hashes: equal hashes of one prompt are one image; None where unknown.
        labels_P: float64 [P], P(image_0 preferred) as people gave it, NaN without a label; None where unknown.
        votes_P: float64 [P], number of votes behind each label, NaN or None where unknown.
    """

    scores: Mapping[str, np.ndarray]
    prompts: Sequence[str] | None = None
    images_P2: np.ndarray | None = None
    labels_P: np.ndarray | None = None
    votes_P: np.ndarray | None = None


class Preference(ABC):
    """Converts the scores of both images of a pair to P(image_0 preferred).

    Swapping the images must give 1 - p.

    Attributes:
        name: the value of ``--preference``.
        summary: one line for the help of ``--preference``.
        calibration: whether an output of ``smpo-pipeline calibrate`` is refused, optional or required.
        normalise_weights: whether weights are scaled to sum to 1.
        needs_images: whether a pair's p depends on the other images of its prompt, so that all pairs must be given.
        uses_rewards: whether p depends on scores.
        uses_labels: whether p depends on the label and the number of votes.
        needs: what a pair must have, for the message about pairs that are left out.
        weights: weights by reward name, as the mix uses them.
        scales: divisors of score differences by reward name, in units of the raw score.
        strength: strength of the prior of the votes, counted in votes; only for mixes that use labels.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    calibration: ClassVar[Literal["refused", "optional", "required"]]
    normalise_weights: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    uses_rewards: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = False
    needs: ClassVar[str] = "scores"
    weights: Mapping[str, float]
    scales: Mapping[str, float]

    def __init__(
        self,
        weights: Mapping[str, float],
        statistics: Mapping[str, RewardStatistics],
        temperatures: Mapping[str, float] | None = None,
        strength: float = 0.0,
    ) -> None:
        """Check the rewards and fix their scales.

        Args:
            weights: weights by reward name.
            statistics: statistics by reward name; without a calibration, max - min is the reward's scale.
            temperatures: tau by reward name, from a calibration, which is then the reward's scale.
            strength: strength of the prior of the votes (:meth:`strength_of`).

        Raises:
            UserError: a weight is invalid, or a reward is unknown or constant over the data set.
        """
        for name in weights:
            if name not in statistics:
                raise UserError(f"reward {name!r} was not scored (scored: {', '.join(statistics) or 'none'})")
            if temperatures is not None and name not in temperatures:
                raise UserError(f"reward {name!r} was not calibrated (calibrated: {', '.join(temperatures)})")
        self.strength = strength
        self.weights = normalised(weights) if self.normalise_weights else dict(weights)
        self.scales = {
            name: score_range(statistics[name]) if temperatures is None else temperatures[name] for name in weights
        }

    @classmethod
    def strength_of(cls, calibration: Calibration | None) -> float:  # noqa: ARG003
        """Return the strength of the prior of the votes, counted in votes: the calibration's, or a default."""
        return 0.0

    @abstractmethod
    def probability(self, pairs: ScoredPairs) -> np.ndarray:
        """Return P(image_0 preferred), float64 [P], from 0 to 1."""

    def margins(self, pairs: ScoredPairs) -> np.ndarray:
        """Return (r_0 - r_1) / scale of each reward, float64 [P, K], in the order of ``weights``."""
        scores = {name: np.asarray(pairs.scores[name], dtype=np.float64) for name in self.weights}
        return np.stack([(s[:, 0] - s[:, 1]) / self.scales[name] for name, s in scores.items()], axis=1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=np.float64)))


def score_range(statistics: RewardStatistics) -> float:
    """Return max - min of a reward over the data set.

    Raises:
        UserError: the reward is constant.
    """
    extent = statistics.max - statistics.min
    if extent <= 0:
        raise UserError(
            f"reward model {statistics.model}: all images have the score {statistics.min}, so it prefers none of them"
        )
    return extent


def normalised(weights: Mapping[str, float]) -> dict[str, float]:
    """Scale weights to sum to 1.

    Raises:
        UserError: one is negative, or all are 0.
    """
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"--reward {name}:{weight:g}: this mix's weights are shares; give 0 or more")
    total = math.fsum(weights.values())
    if total <= 0:
        raise UserError(f"--reward {', '.join(weights)}: the weights are all 0")
    return {name: weight / total for name, weight in weights.items()}
