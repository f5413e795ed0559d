"""``calibration.json``: each reward's temperature and weight, fitted to labels, and how well mixes fit them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from smpo_common.errors import UserError
from smpo_common.files import read_versioned, write_json
from smpo_schemas.frozen import FrozenModel

CALIBRATION_VERSION = 1
CALIBRATION_FILE = "calibration.json"

_ROUNDING = 1e-6


class CalibratedReward(FrozenModel):
    """One reward of the mixture.

    Attributes:
        model, fingerprint, unit: as in ``scores.json``; scores of another model need another calibration.
        tau: temperature in the mixture, in units of the raw score.
        weight: share of the annotators in the mixture; the shares sum to 1.
        tau_alone: temperature if this were the only reward.
    """

    model: str
    fingerprint: str
    unit: str
    tau: float = Field(gt=0, allow_inf_nan=False)
    weight: float = Field(ge=0, le=1)
    tau_alone: float = Field(gt=0, allow_inf_nan=False)


class Bin(FrozenModel):
    """One bin of the reliability diagram: pairs whose preferred image has a p from ``start`` to ``stop``.

    Attributes:
        start, stop: bounds of p.
        labels: number of labels; a share of n votes counts as n.
        mean_p: mean p of the preferred image.
        share_chosen: share of labels that chose this image; a tie counts half.
    """

    start: float
    stop: float
    labels: int
    mean_p: float
    share_chosen: float


class Fit(FrozenModel):
    """How well p predicts labels that it was not fitted to.

    Attributes:
        agreement: share of decided labels that p orders the same way; p = 0.5 orders none.
        log_loss: mean cross-entropy of the labels in nats, ties as 0.5, shares weighted by their votes; p = 0.5
            everywhere gives ln 2.
        calibration_error: expected calibration error over ``bins``.
        bins: the reliability diagram, without empty bins.
    """

    agreement: float | None
    log_loss: float
    calibration_error: float
    bins: list[Bin]


class VotesPrior(FrozenModel):
    """Strength of the Beta prior of a pair's true share of votes, in votes, by beta-binomial maximum likelihood.

    Attributes:
        strength: strength of the prior with mean 1/2 (``--preference votes``).
        mixture_strength: strength of the prior whose mean is the mixture's p, predicted on held-out prompts
            (``--preference votes-mixture``).
        pairs: number of pairs with labels.
        votes: number of votes.
    """

    strength: float = Field(gt=0, allow_inf_nan=False)
    mixture_strength: float = Field(gt=0, allow_inf_nan=False)
    pairs: int
    votes: int


class Calibration(FrozenModel):
    """The whole of ``calibration.json``.

    Attributes:
        schema_version: version of this file's format.
        rewards: the mixture, by reward name.
        weights: ``fitted``, or ``equal`` where equal weights did better on held-out prompts.
        held_out: fit of each reward and mix, by name, over all labels; each is predicted by a fit to the other folds.
        labels: number of pairs' labels, ties and shares included.
        ties: number of ties among them.
        prompts: number of prompts.
        folds: number of folds of the cross-validation.
        seed: seed of the assignment of prompts to folds.
        scores_sha256: hash of ``scores.json``.
        votes: the prior of the votes; None in files of older versions.
    """

    schema_version: int
    rewards: dict[str, CalibratedReward] = Field(min_length=1)
    weights: Literal["fitted", "equal"]
    held_out: dict[str, Fit]
    labels: int
    ties: int
    prompts: int
    folds: int
    seed: int
    scores_sha256: str
    votes: VotesPrior | None = None

    @model_validator(mode="after")
    def _shares(self) -> Self:
        total = math.fsum(reward.weight for reward in self.rewards.values())
        if abs(total - 1) > _ROUNDING:
            raise ValueError(f"the weights sum to {total}, not to 1")
        return self


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write ``calibration.json``."""
    write_json(path, calibration.model_dump())


def read_calibration(path: Path) -> Calibration:
    """Read and validate ``calibration.json``.

    Raises:
        UserError: it is missing, malformed or of another schema version.
    """
    if path.is_dir():
        raise UserError(f"--calibration {path} is a folder; name the {CALIBRATION_FILE} in it")
    if not path.exists():
        raise UserError(f"--calibration {path} does not exist; `smpo-pipeline calibrate` writes such a file")
    return read_versioned(path, Calibration, CALIBRATION_VERSION, "calibrate again")
