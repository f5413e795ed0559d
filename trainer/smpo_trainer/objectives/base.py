"""What an objective is given, what it gives back, and what all of them report.

Shape suffixes: B a batch of states, P pairs, 2 images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from smpo_common.errors import UserError
from smpo_schemas.labels import TIE
from smpo_trainer.settings import TimestepWeightingKind

if TYPE_CHECKING:
    from smpo_trainer.preference.reward_mix import RewardMix

Metrics = dict[str, torch.Tensor]
"""Per-pair values by name, each [B], detached; NaN where the pair has no such value. Their mean is what is logged."""

DPO_BETAS = {"sd15": 2000.0, "sd2": 2000.0, "sdxl": 5000.0}
"""By model kind: Diffusion-DPO's and SmPO's; SD 2 takes SD 1.5's."""

FORWARD = {"source": "forward", "forward_noise": "pair"}
"""States of Diffusion-DPO, and of those that took them over: one forward noise for both images."""


class ObjectiveOptions(BaseModel):
    """What a user sets of an objective. One with options of its own adds them as fields, with a description.

    Attributes:
        beta: scale of the implicit reward: error times beta/2. The larger, the closer the model stays to the reference.
        gamma: scale of the smoothed preference: how sure a pair with p = 1 is.
        num_train_timesteps: T of the model's noise levels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    beta: float
    gamma: float = 10.0
    num_train_timesteps: int = 1000

    @classmethod
    def own(cls) -> tuple[str, ...]:
        """The names of the options that only this objective has."""
        return tuple(name for name in cls.model_fields if name not in ObjectiveOptions.model_fields)

    @classmethod
    def parse(cls, objective: str, texts: Mapping[str, str], **common: float) -> Self:
        """Options from the values of ``--objective-option``.

        Raises:
            UserError: the objective has no such option, or the value does not suit it.
        """
        for name in texts:
            if name not in cls.own():
                described = "; ".join(f"{n} ({cls.model_fields[n].description})" for n in cls.own())
                has = f"it has: {described}" if described else "it has none"
                raise UserError(f"--objective-option {name}: --objective {objective} has no such option; {has}")
        try:
            return cls.model_validate({**common, **texts})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise UserError(f"--objective-option {name}={texts.get(name)}: {first['msg']}") from error


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
        summary: one line for the list of objectives.
        uses_rewards: whether it needs the preference of a reward mix.
        uses_reference: whether its loss depends on the reference; without, the reference only serves what is logged.
        needs: what a pair must have to be used, for the message about those that are left out.
        betas: the published beta by model kind.
        timestep_weighting: the published one.
        sigmoid_bias: the published bias of the weighting ``sigmoid``.
        published_shards: what the method's own states were made with, by the names in a manifest's ``inversion``.
        Options: its options; a subclass of :class:`ObjectiveOptions` where it has some of its own.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    uses_rewards: ClassVar[bool]
    uses_reference: ClassVar[bool] = True
    needs: ClassVar[str]
    betas: ClassVar[Mapping[str, float]] = DPO_BETAS
    timestep_weighting: ClassVar[TimestepWeightingKind] = "uniform"
    sigmoid_bias: ClassVar[float] = 0.0
    published_shards: ClassVar[Mapping[str, object]] = {}
    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions

    def __init__(self, options: ObjectiveOptions) -> None:
        self.options = options

    @classmethod
    def resolve_beta(cls, beta: float | None, kind: str) -> float:
        """The given beta, or the published one for the model's kind.

        Raises:
            UserError: none is given and none is published for this kind.
        """
        if beta is not None:
            return beta
        if kind not in cls.betas:
            raise UserError(f"--objective {cls.name}: no beta is published for {kind} models; choose one with --beta")
        return cls.betas[kind]

    @classmethod
    def warnings(cls, mix: RewardMix) -> list[str]:  # noqa: ARG003
        """What of a reward mix makes the method another than the published one, in lines."""
        return []

    @abstractmethod
    def usable(self, preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:
        """Which pairs there is something to learn from: bool [P].

        The others are left out before any batch is made, so that a batch's mean is always over pairs that count.

        Args:
            preference_P: float [P], NaN where there is none.
            label_P: float [P], NaN where there is none.
        """

    @abstractmethod
    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """Positive where the model shall come to prefer image_0, negative where image_1, 0 where neither: [B]."""

    @abstractmethod
    def loss(self, batch: PairBatch) -> torch.Tensor:
        """The loss of each pair, [B], whose mean over the effective batch is minimised."""

    def __call__(self, batch: PairBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss of each pair and its metrics."""
        return self.loss(batch), reward_metrics(batch, self.options.beta, self.preferred(batch))

    def margin(self, batch: PairBatch) -> torch.Tensor:
        """h, the implicit reward margin of image_0, [B]."""
        return implicit_margin(batch.error_B2, batch.ref_error_B2, self.options.beta)


class LabelObjective(Objective):
    """An objective that learns from the annotators' decided labels."""

    uses_rewards: ClassVar[bool] = False
    needs: ClassVar[str] = "a label that is no tie"

    def usable(self, preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """See the base class: ties and pairs that nobody labelled are left out."""
        return ~np.isnan(label_P) & (label_P != TIE)

    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return batch.label_B - TIE


class RewardObjective(Objective):
    """An objective that learns from P(image_0 preferred) under the reward mix."""

    uses_rewards: ClassVar[bool] = True
    needs: ClassVar[str] = "scores"

    def usable(self, preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """See the base class: every scored pair."""
        return ~np.isnan(preference_P)

    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        # 2p - 1 rather than p - 1/2: the sign of exactly what the losses use.
        return 2 * batch.preference_B - 1


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


def of_preferred(value_B2: torch.Tensor, preferred_B: torch.Tensor) -> torch.Tensor:
    """The preferred image's value, [B]; NaN where neither is preferred."""
    nothing_B = torch.full_like(value_B2[:, 0], float("nan"))
    return torch.where(preferred_B > 0, value_B2[:, 0], torch.where(preferred_B < 0, value_B2[:, 1], nothing_B))


def smoothed_label(label_B: torch.Tensor, smoothing: float) -> torch.Tensor:
    """P(image_0 preferred) if a share ``smoothing`` of the decided labels is wrong: 1 - s, s, or 1/2 for a tie."""
    certain_B = (1 + (label_B - TIE).sign()) / 2
    return smoothing + (1 - 2 * smoothing) * certain_B


def reward_metrics(batch: PairBatch, beta: float, preferred_B: torch.Tensor) -> Metrics:
    """Implicit rewards under the names that TRL made common.

    Args:
        batch: the states.
        beta: scale of the implicit reward.
        preferred_B: positive where image_0 is the preferred one, negative where image_1 is, 0 where neither: such
            pairs have none of these values.
    """
    reward_B2 = implicit_rewards(batch.error_B2.detach(), batch.ref_error_B2, beta)
    margin_B = implicit_margin(batch.error_B2.detach(), batch.ref_error_B2, beta) * preferred_B.sign()
    nothing_B = torch.full_like(margin_B, float("nan"))
    return {
        "rewards/chosen": of_preferred(reward_B2, preferred_B),
        "rewards/rejected": of_preferred(reward_B2, -preferred_B),
        "rewards/margins": torch.where(preferred_B == 0, nothing_B, margin_B),
        "rewards/accuracies": torch.where(preferred_B == 0, nothing_B, (margin_B > 0).to(margin_B.dtype)),
    }
