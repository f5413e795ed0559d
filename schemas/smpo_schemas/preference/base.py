"""What a way of mixing rewards is to this project.

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
from smpo_schemas.scores import RewardStatistics


@dataclass(frozen=True)
class ScoredPairs:
    """P pairs and what rewards say of them.

    Attributes:
        scores: per reward float [P, 2], raw scores of image_0 and image_1.
        prompts: of each pair; None where only the scores are known.
        images_P2: str [P, 2], names of the images: equal names of one prompt are one image; None where unknown.
    """

    scores: Mapping[str, np.ndarray]
    prompts: Sequence[str] | None = None
    images_P2: np.ndarray | None = None


class Preference(ABC):
    """A way from the scores of both images of a pair to P(image_0 preferred).

    A subclass in a file of this folder is found by itself. Swapping the images must give 1 - p.

    Attributes:
        name: what ``--preference`` calls it.
        calibration: whether it takes the temperatures that ``smpo-pipeline calibrate`` fits to labels.
        needs_images: whether a pair's p depends on the other images of its prompt, so that all of them must be known.
        weights: by reward name, as the mix uses them.
        scales: by reward name, what its differences are divided by, in units of its raw score.
    """

    name: ClassVar[str]
    calibration: ClassVar[Literal["refused", "optional", "required"]]
    needs_images: ClassVar[bool] = False
    weights: Mapping[str, float]
    scales: Mapping[str, float]

    def __init__(
        self,
        weights: Mapping[str, float],
        statistics: Mapping[str, RewardStatistics],
        temperatures: Mapping[str, float] | None = None,
    ) -> None:
        """Check the rewards and fix their scales.

        Args:
            weights: by reward name, at least one.
            statistics: by reward name, the extremes that bring its scores to one scale.
            temperatures: by reward name, tau from a calibration; None: each reward's extremes are its scale.

        Raises:
            UserError: a weight does not fit, or a reward is unknown, or it is constant over the data set.
        """
        for name in weights:
            if name not in statistics:
                raise UserError(f"reward {name!r} is not among the scored ones ({', '.join(statistics) or 'none'})")
            if temperatures is not None and name not in temperatures:
                raise UserError(f"reward {name!r} is not among the calibrated ones ({', '.join(temperatures)})")
        self.weights = dict(weights)
        self.scales = {
            name: spread(statistics[name]) if temperatures is None else temperatures[name] for name in weights
        }

    @abstractmethod
    def probability(self, pairs: ScoredPairs) -> np.ndarray:
        """P(image_0 preferred): float64 [P], from 0 to 1."""

    def margins(self, pairs: ScoredPairs) -> np.ndarray:
        """(r_0 - r_1) / scale of each reward: float64 [P, K], in the order of ``weights``."""
        columns = [np.asarray(pairs.scores[name], dtype=np.float64) for name in self.weights]
        return np.stack(
            [(each[:, 0] - each[:, 1]) / self.scales[name] for name, each in zip(self.weights, columns, strict=True)],
            axis=1,
        )


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function that does not overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=np.float64)))


def spread(statistics: RewardStatistics) -> float:
    """Max - min of a reward over the data set.

    Raises:
        UserError: the reward is constant.
    """
    found = statistics.max - statistics.min
    if found <= 0:
        raise UserError(
            f"reward model {statistics.model}: all images have the score {statistics.min}, so it prefers none of them"
        )
    return found


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights as shares of a population: they sum to 1.

    Raises:
        UserError: one is negative, or all are 0.
    """
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"--reward {name}:{weight:g}: the weight is a share of the annotators, so not negative")
    total = math.fsum(weights.values())
    if total <= 0:
        raise UserError(f"--reward {', '.join(weights)}: the weights are all 0")
    return {name: weight / total for name, weight in weights.items()}
