"""The base class of objectives, their input, and the metrics that all of them report.

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
from smpo_trainer.loss_settings import TimestepWeightingKind

if TYPE_CHECKING:
    from smpo_trainer.preference.reward_mix import RewardMix

Metrics = dict[str, torch.Tensor]
"""Detached per-pair values by name, each [B]; NaN where a pair has no such value. The mean of the others is logged."""

DPO_BETAS = {
    "sd15": 2000.0,
    "sd2": 2000.0,
    "sdxl": 5000.0,
    "sd3": 5000.0,
    "sd35": 5000.0,
    "flux1-dev": 2000.0,
    "flux1-schnell": 2000.0,
}
"""Beta by model kind: Diffusion-DPO's and SmPO's (SD 2 uses the value of SD 1.5), for SD3 and FLUX.1 PNAPO's (arXiv
2605.09433). SD3's is also that of the DPO baseline of Linear-DPO's code (arXiv 2605.21123); SD3.5 uses it too."""

SATURATED = 0.05
"""A state is saturated below this gradient factor, a tenth of that at the reference."""

FORWARD = {"source": "forward", "forward_noise": "pair"}
"""States of Diffusion-DPO and its descendants: forward diffusion with the same noise for both images."""


class ObjectiveOptions(BaseModel):
    """Options of an objective. A subclass adds the options that only its objective has, as fields with a description.

    Attributes:
        beta: scale of the implicit reward (error times beta/2). Larger values keep the model closer to the reference.
        gamma: scale of the smoothed preference, the confidence in a pair with p = 1.
        num_train_timesteps: T, the length of the noise schedule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    beta: float
    gamma: float = 10.0
    num_train_timesteps: int = 1000

    @classmethod
    def own(cls) -> tuple[str, ...]:
        """Return the names of the options that only this objective has."""
        return tuple(name for name in cls.model_fields if name not in ObjectiveOptions.model_fields)

    @classmethod
    def parse(cls, objective: str, texts: Mapping[str, str], **common: float) -> Self:
        """Read options from the values of ``--objective-option``.

        Raises:
            UserError: the objective lacks this option, or the value is invalid.
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
    """Input of an objective: B states. Index 0/1 is image_0/image_1, in data set order.

    Attributes:
        error_B2: errors of the policy (mean squared over C, h, w), float32, with gradient.
        ref_error_B2: errors of the reference at the same states, float32.
        preference_B: P(image_0 preferred) under the reward mix, float32; NaN without scores.
        label_B: the annotator's P(image_0 preferred), float32; NaN without a label.
        timestep_B: int64 (float32 for flow-matching models).
        cross_B: mean over C, h, w of the product of both images' differences between the policy's output and target,
            float32; None if unknown.
        norm_B2: root mean square of the policy's outputs, float32, with gradient; None if unknown.
        ref_norm_B2: root mean square of the reference's outputs at the same states, float32; None if unknown.
    """

    error_B2: torch.Tensor
    ref_error_B2: torch.Tensor
    preference_B: torch.Tensor
    label_B: torch.Tensor
    timestep_B: torch.Tensor
    cross_B: torch.Tensor | None = None
    norm_B2: torch.Tensor | None = None
    ref_norm_B2: torch.Tensor | None = None


class Objective(ABC):
    """A loss on pairs.

    Attributes:
        name: value of ``--objective``.
        summary: one line for ``--list-objectives``.
        uses_rewards: whether it needs the preference of a reward mix.
        uses_reference: whether the loss depends on the reference. If not, the reference only serves the metrics.
        prefers: whether one image of a pair is preferred, so that a budget has an image to limit.
        trains_negative: whether the result is a model to guide away from.
        needs: requirement on a pair, for the message about pairs that are left out.
        betas: published beta by model kind.
        timestep_weighting: published weighting of timesteps.
        sigmoid_bias: published bias of the ``sigmoid`` weighting.
        published_shards: inversion settings of the published states, by the names in a manifest's ``inversion``.
        Options: class of its options; a subclass of :class:`ObjectiveOptions` if it has options of its own.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    uses_rewards: ClassVar[bool]
    uses_reference: ClassVar[bool] = True
    prefers: ClassVar[bool] = True
    trains_negative: ClassVar[bool] = False
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
        """Return the given beta, or the one published for this kind of model.

        Where none is published, a loss without the reference takes that of SD 1.5, for what is logged.

        Raises:
            UserError: no beta is given, the loss depends on it, and none is published for this kind.
        """
        if beta is not None:
            return beta
        if kind not in cls.betas:
            if not cls.uses_reference:
                return cls.betas["sd15"]
            raise UserError(f"--objective {cls.name}: no beta is published for {kind} models; choose one with --beta")
        return cls.betas[kind]

    def with_beta(self, beta: float) -> Self:
        """Return the same objective with another beta."""
        return type(self)(self.options.model_copy(update={"beta": beta}))

    @classmethod
    def warnings(cls, mix: RewardMix) -> list[str]:  # noqa: ARG003
        """Return one line for each property of the reward mix that departs from the published method."""
        return []

    @abstractmethod
    def usable(self, preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:
        """Select the pairs that the objective can learn from: bool [P].

        The others are left out before batches are made, so that the mean of a batch is over pairs that count.

        Args:
            preference_P: P(image_0 preferred), float [P]; NaN without scores.
            label_P: the annotator's P(image_0 preferred), float [P]; NaN without a label.
        """

    @abstractmethod
    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """Return the training target, [B]: positive to prefer image_0, negative to prefer image_1, 0 for neither."""

    @abstractmethod
    def loss(self, batch: PairBatch) -> torch.Tensor:
        """Compute the loss of each pair, [B]; its mean over the effective batch is minimised."""

    def __call__(self, batch: PairBatch) -> tuple[torch.Tensor, Metrics]:
        """Compute the loss of each pair, [B], and metrics."""
        preferred_B, logit_B = self.preferred(batch), self.logit(batch)
        metrics = reward_metrics(batch, self.options.beta, preferred_B)
        if logit_B is not None:
            metrics |= gradient_metrics(logit_B.detach(), preferred_B)
        return self.loss(batch), metrics

    @classmethod
    def has_sigmoid(cls) -> bool:
        """Whether the loss is -log sigmoid(z) of :meth:`logit`."""
        return cls.logit is not Objective.logit

    def logit(self, batch: PairBatch) -> torch.Tensor | None:  # noqa: ARG002
        """Return z, [B], if the loss is -log sigmoid(z), for the metrics of its gradient; None for another loss."""
        return None

    def margin(self, batch: PairBatch) -> torch.Tensor:
        """Compute h, the implicit reward margin of image_0, [B]."""
        return implicit_margin(batch.error_B2, batch.ref_error_B2, self.options.beta)


class LabelObjective(Objective):
    """An objective that learns from the annotators' labels; ties are left out."""

    uses_rewards: ClassVar[bool] = False
    needs: ClassVar[str] = "a decided label"

    def usable(self, preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """See the base class; ties and unlabelled pairs are left out."""
        return ~np.isnan(label_P) & (label_P != TIE)

    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return batch.label_B - TIE


class RewardObjective(Objective):
    """An objective that learns from P(image_0 preferred) under the reward mix."""

    uses_rewards: ClassVar[bool] = True
    needs: ClassVar[str] = "scores"

    def usable(self, preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """See the base class; every scored pair is used."""
        return ~np.isnan(preference_P)

    def preferred(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        # 2p - 1, not p - 1/2: its sign must equal that of the factor in the losses, also after rounding.
        return 2 * batch.preference_B - 1


def implicit_rewards(error_B2: torch.Tensor, ref_error_B2: torch.Tensor, beta: float) -> torch.Tensor:
    """Compute the implicit reward of each image, -(beta/2) (error - ref_error), [B, 2]."""
    return -(beta / 2) * (error_B2 - ref_error_B2)


def implicit_margin(error_B2: torch.Tensor, ref_error_B2: torch.Tensor, beta: float) -> torch.Tensor:
    """Compute the implicit reward margin of image_0, h = -(beta/2) (d_theta - d_ref), [B].

    See arXiv 2311.12908, equation 14.
    """
    # Subtract the two images of a pair first: most of the rounding of the four errors cancels.
    d_theta_B = error_B2[:, 0] - error_B2[:, 1]
    d_ref_B = ref_error_B2[:, 0] - ref_error_B2[:, 1]
    return -(beta / 2) * (d_theta_B - d_ref_B)


def select_preferred(value_B2: torch.Tensor, preferred_B: torch.Tensor) -> torch.Tensor:
    """Select the value of the preferred image, [B]; NaN where neither is preferred."""
    nothing_B = torch.full_like(value_B2[:, 0], float("nan"))
    return torch.where(preferred_B > 0, value_B2[:, 0], torch.where(preferred_B < 0, value_B2[:, 1], nothing_B))


def smoothed_label(label_B: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return P(image_0 preferred), [B], if a share s of the labels is wrong: 1 - s, s, or 1/2 for a tie."""
    certain_B = (1 + (label_B - TIE).sign()) / 2
    return smoothing + (1 - 2 * smoothing) * certain_B


def reward_metrics(batch: PairBatch, beta: float, preferred_B: torch.Tensor) -> Metrics:
    """Compute implicit rewards, under the names of TRL's metrics.

    Args:
        batch: the states.
        beta: scale of the implicit reward.
        preferred_B: positive where image_0 is preferred, negative where image_1 is, 0 where neither is. Pairs with 0
            have none of these values.
    """
    reward_B2 = implicit_rewards(batch.error_B2.detach(), batch.ref_error_B2, beta)
    margin_B = implicit_margin(batch.error_B2.detach(), batch.ref_error_B2, beta) * preferred_B.sign()
    nothing_B = torch.full_like(margin_B, float("nan"))
    return {
        "rewards/chosen": select_preferred(reward_B2, preferred_B),
        "rewards/rejected": select_preferred(reward_B2, -preferred_B),
        "rewards/margins": torch.where(preferred_B == 0, nothing_B, margin_B),
        "rewards/margins_rms": torch.where(preferred_B == 0, nothing_B, margin_B),
        "rewards/accuracies": torch.where(preferred_B == 0, nothing_B, (margin_B > 0).to(margin_B.dtype)),
    }


def gradient_metrics(logit_B: torch.Tensor, preferred_B: torch.Tensor) -> Metrics:
    """Compute the gradient factor of the loss -log sigmoid(z), and whether it is saturated: [B] each.

    The gradient factor sigmoid(-z), the size of the loss's derivative by z, is 1/2 at the reference whatever beta is,
    and near 0 where the loss is saturated.

    Args:
        logit_B: z.
        preferred_B: as in :func:`reward_metrics`.
    """
    factor_B = (-logit_B).sigmoid().where(preferred_B != 0, torch.nan)
    saturated_B = (factor_B < SATURATED).to(factor_B.dtype).where(preferred_B != 0, torch.nan)
    return {"gradient_factor": factor_B, "saturated": saturated_B}
