"""Calibrate: read the scores, cross-validate, measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smpo_common.files import sha256_file
from smpo_common.store_path import AnyPath
from smpo_pipeline.calibration.agreement import AnnotatorAgreement, between_annotators, by_annotator
from smpo_pipeline.calibration.cross_validation import (
    COIN,
    EQUAL_MIXTURE,
    FITTED,
    MIXTURE,
    SHARP_MINMAX,
    CrossValidation,
    cross_validate,
)
from smpo_pipeline.calibration.labels import LabelledPairs, read_labelled
from smpo_pipeline.calibration.measures import measure
from smpo_pipeline.calibration.votes import fit_votes_prior
from smpo_schemas.scoring.calibration import CALIBRATION_VERSION, CalibratedReward, Calibration
from smpo_schemas.scoring.scores import SCORES_FILE

_MOST_ANNOTATORS = 10


@dataclass(frozen=True)
class CalibrationResult:
    """The calibration and what the report and the plot show.

    Attributes:
        calibration: the content of ``calibration.json``.
        data: scores and labels.
        held_out: predictions and fits of the folds.
        annotators: for each reward or mix and each annotator, the number of decided labels that it agrees with, and of
            all decided labels. Left out are mixes that order pairs just as another one does (they differ in temperature
            only), and the mixture that was not chosen.
        people: how people agree with each other.
    """

    calibration: Calibration
    data: LabelledPairs
    held_out: CrossValidation
    annotators: dict[str, dict[str, tuple[int, int]]]
    people: AnnotatorAgreement


def calibrate(
    scores: Path,
    rewards: Sequence[str],
    *,
    folds: int,
    seed: int,
    labels: AnyPath | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> CalibrationResult:
    """Calibrate rewards to the labels of an output of ``score``.

    Args:
        scores: the output's folder.
        rewards: names of rewards; empty: all.
        folds: number of parts of the prompts, each held out once.
        seed: assigns the prompts to folds.
        labels: a file of votes, whose labels replace those of the scores.
        done: called with the number of finished fits, of ``folds`` + 1.

    Raises:
        UserError: the scores or labels cannot be used.
    """
    data = read_labelled(scores, rewards, labels)
    held_out = cross_validate(data, folds, seed, done)
    rows = data.labelled
    truth = data.labels_P[rows], data.votes_P[rows]
    mixture = held_out.mixture
    calibration = Calibration(
        schema_version=CALIBRATION_VERSION,
        rewards={
            name: CalibratedReward(
                model=statistics.model,
                fingerprint=statistics.fingerprint,
                unit=statistics.unit,
                tau=float(mixture.tau_K[k]),
                weight=float(mixture.weight_K[k]),
                tau_alone=held_out.final.alone[name],
            )
            for k, (name, statistics) in enumerate(data.statistics.items())
        },
        weights="equal" if held_out.equal_weights else "fitted",
        held_out={name: measure(p_P[rows], *truth) for name, p_P in held_out.p.items()},
        labels=int(rows.sum()),
        ties=int(rows.sum() - data.decided.sum()),
        prompts=len({data.prompts[row] for row in np.flatnonzero(rows).tolist()}),
        folds=folds,
        seed=seed,
        scores_sha256=sha256_file(scores / SCORES_FILE),
        votes=fit_votes_prior(data, held_out.p[held_out.chosen]),
    )
    left_out = {COIN, SHARP_MINMAX, MIXTURE, EQUAL_MIXTURE, *(name + FITTED for name in data.statistics)}
    left_out.remove(held_out.chosen)
    annotators = {
        name: by_annotator(data, p_P, _MOST_ANNOTATORS) for name, p_P in held_out.p.items() if name not in left_out
    }
    return CalibrationResult(calibration, data, held_out, annotators, between_annotators(data))
