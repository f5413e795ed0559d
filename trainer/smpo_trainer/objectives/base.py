"""What an objective is given, what it gives back, and what all of them report (DESIGN 4.4).

Shape suffixes: B a batch of states, P pairs, 2 images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

Metrics = dict[str, torch.Tensor]
"""Per-pair values by name, each [B], detached; NaN where the pair has no such value. Their mean is what is logged."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """What a user sets of an objective.

    Attributes:
        beta: scale of the implicit reward: error times beta/2. The larger, the closer the model stays to the reference.
        gamma: scale of the smoothed preference: how sure a pair with p = 1 is.
    """

    beta: float
    gamma: float


@dataclass(frozen=True)
class PairBatch:
    """Everything that an objective may know of B states; index 0/1 is image_0/image_1, in data set order.

    Attributes:
        error_B2: the trained model's errors (mean squared over C, h, w), float32; carries the gradient.
        ref_error_B2: the reference's errors at the same states, float32.
        preference_B: P(image_0 preferred) under the reward mix, float32; NaN where there is none.
        label_B: the annotator's P(image_0 preferred), float32; NaN where nobody labelled.
        timestep_B: int64.
    """

    error_B2: torch.Tensor
    ref_error_B2: torch.Tensor
    preference_B: torch.Tensor
    label_B: torch.Tensor
    timestep_B: torch.Tensor


class Objective(ABC):
    """A loss of pairs.

    Attributes:
        name: as in ``--objective``.
        uses_rewards: whether it needs the preference of a reward mix.
        needs: what a pair must have to be used, for the message about those that are left out.
    """

    name: ClassVar[str]
    uses_rewards: ClassVar[bool]
    needs: ClassVar[str]

    def __init__(self, options: ObjectiveOptions) -> None:
        self.options = options

    @staticmethod
    @abstractmethod
    def usable(preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:
        """Which pairs there is something to learn from: bool [P].

        The others are left out before any batch is made, so that a batch's mean is always over pairs that count.

        Args:
            preference_P: float [P], NaN where there is none.
            label_P: float [P], NaN where there is none.
        """

    @abstractmethod
    def __call__(self, batch: PairBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss of each pair, [B], whose mean over the effective batch is minimised, and metrics."""


def implicit_rewards(error_B2: torch.Tensor, ref_error_B2: torch.Tensor, beta: float) -> torch.Tensor:
    """How much better than the reference the model explains each image: -(beta/2) (error - ref_error), [B, 2]."""
    return -(beta / 2) * (error_B2 - ref_error_B2)


def implicit_margin(error_B2: torch.Tensor, ref_error_B2: torch.Tensor, beta: float) -> torch.Tensor:
    """Implicit reward margin of image_0: h = -(beta/2) (d_theta - d_ref), [B] (arXiv 2311.12908, equation 14).

    The differences between a pair's images are taken first: most rounding of the four errors cancels there.
    """
    d_theta_B = error_B2[:, 0] - error_B2[:, 1]
    d_ref_B = ref_error_B2[:, 0] - ref_error_B2[:, 1]
    return -(beta / 2) * (d_theta_B - d_ref_B)


def reward_metrics(batch: PairBatch, beta: float, preferred_B: torch.Tensor) -> Metrics:
    """Implicit rewards under the names that TRL made common.

    Args:
        batch: the states.
        beta: scale of the implicit reward.
        preferred_B: positive where image_0 is the preferred one, negative where image_1 is, 0 where neither: such
            pairs have none of these values.
    """
    reward_B2 = implicit_rewards(batch.error_B2.detach(), batch.ref_error_B2, beta)
    nothing = torch.full_like(reward_B2[:, 0], float("nan"))
    first, second = reward_B2.unbind(1)
    chosen = torch.where(preferred_B > 0, first, torch.where(preferred_B < 0, second, nothing))
    rejected = torch.where(preferred_B > 0, second, torch.where(preferred_B < 0, first, nothing))
    margin = implicit_margin(batch.error_B2.detach(), batch.ref_error_B2, beta) * preferred_B.sign()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": torch.where(preferred_B == 0, nothing, margin),
        "rewards/accuracies": torch.where(preferred_B == 0, nothing, (margin > 0).to(margin.dtype)),
    }
