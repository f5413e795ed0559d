"""Diffusion-DPO (arXiv 2311.12908, equation 14), trained on the annotators' labels.

Label smoothing is that of conservative DPO (E. Mitchell's note on DPO with noisy preferences, 2023; TRL's
``label_smoothing``): the cross entropy with a label that is wrong with this probability. A tie counts as the label 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from smpo_trainer.objectives.base import (
    LabelObjective,
    ObjectiveOptions,
    PairBatch,
    implicit_rewards,
    smoothed_label,
)


def dpo_loss(margin_B: torch.Tensor, label_B: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Compute -q log sigmoid(h) - (1 - q) log sigmoid(-h), [B].

    Without smoothing q is 1 or 0, and the loss is -log sigmoid(sign(label - 1/2) h).

    Args:
        margin_B: h, the implicit reward margin of image_0.
        label_B: the annotator's P(image_0 preferred); only its side of 1/2 counts.
        label_smoothing: s; q is 1 - s, s, or 1/2 for a tie.
    """
    target_B = smoothed_label(label_B, label_smoothing)
    return -target_B * functional.logsigmoid(margin_B) - (1 - target_B) * functional.logsigmoid(-margin_B)


class DPOOptions(ObjectiveOptions):
    """Options of Diffusion-DPO."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of wrong labels; default 0")
    ties: Literal["drop", "keep"] = Field(
        "drop", description="drop leaves ties out, as published; keep pulls their margin to 0; default drop"
    )
    ratio_clip: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="clamp each image's log-likelihood ratio to log(1 - c) .. log(1 + c), with no gradient beyond; "
        "published by D3PO with 0.1; default none",
    )


class DPO(LabelObjective):
    """See :func:`dpo_loss`. On shards made with ``--eta``, it is DDIM-InPO (arXiv 2503.18454)."""

    name: ClassVar[str] = "dpo"
    summary: ClassVar[str] = "labels (Diffusion-DPO, arXiv 2311.12908); with shards made with --eta, DDIM-InPO"
    published_shards: ClassVar[Mapping[str, object]] = {"prompt_dropout": 0.2}
    Options: ClassVar[type[ObjectiveOptions]] = DPOOptions
    options: DPOOptions

    def usable(self, preference_P: np.ndarray, label_P: np.ndarray) -> np.ndarray:
        """See the base class; ``ties=keep`` uses ties too."""
        if self.options.ties == "keep":
            return ~np.isnan(label_P)
        return super().usable(preference_P, label_P)

    def margin(self, batch: PairBatch) -> torch.Tensor:
        """See the base class; with ``ratio_clip`` that of clamped ratios (D3PO, arXiv 2311.13231)."""
        clip, beta = self.options.ratio_clip, self.options.beta
        if clip is None:
            return super().margin(batch)
        # An implicit reward is beta times the log-ratio.
        ratio_B2 = implicit_rewards(batch.error_B2, batch.ref_error_B2, 1.0)
        clamped_B2 = ratio_B2.clamp(math.log(1 - clip), math.log(1 + clip))
        return beta * (clamped_B2[:, 0] - clamped_B2[:, 1])

    def logit(self, batch: PairBatch) -> torch.Tensor:
        """See the base class; label smoothing is ignored."""
        return self.preferred(batch).sign() * self.margin(batch)

    def loss(self, batch: PairBatch) -> torch.Tensor:
        """See the base class."""
        return dpo_loss(self.margin(batch), batch.label_B, self.options.label_smoothing)
