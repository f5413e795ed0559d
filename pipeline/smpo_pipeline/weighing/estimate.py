"""Classify golden images against each source's images, on prompts that the fit has not seen.

Shape suffixes: P pairs, 2 images, S sources, N images of all pairs (2 P), D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from smpo_common.errors import UserError
from smpo_pipeline.calibration.folds import split_by_prompt
from smpo_pipeline.calibration.logistic import Rows, cross_fit
from smpo_pipeline.calibration.measures import calibration_error, reliability
from smpo_pipeline.weighing.formula import GOLDEN

_NOISE = 0.02
"""An AUC counts as chance if it is less than this, or less than two standard errors, above one half."""


@dataclass(frozen=True)
class SourceFit:
    """A classifier between the golden pairs and one source.

    Attributes:
        c_P2: P(golden) of each image, by a fit that has not seen its prompt, float64.
        auc: held-out area under the ROC curve over images; 0.5 is chance.
        calibration_error: held-out, over bins of the likelier class, both classes counting the same.
        l2: the chosen penalty.
        noise: whether the AUC may be chance.
    """

    c_P2: np.ndarray
    auc: float
    calibration_error: float
    l2: float
    noise: bool


def fit_sources(
    x_P2D: np.ndarray, prompts: list[str], source_P: np.ndarray, names: list[str], folds: int, seed: int
) -> list[SourceFit]:
    """Fit a classifier for each source.

    Args:
        x_P2D: features of each image.
        prompts: of each pair.
        source_P: number of each pair's source, or :data:`GOLDEN`.
        names: of the sources.
        folds: number of parts of the prompts, each predicted by a fit to the others.
        seed: assigns the prompts.

    Raises:
        UserError: there are too few prompts.
    """
    fold_P = split_by_prompt(prompts, folds, seed)
    for fold in range(folds):
        rest = source_P[fold_P != fold]
        missing = [name for number, name in [(GOLDEN, "golden"), *enumerate(names)] if not (rest == number).any()]
        if missing:
            raise UserError(f"all pairs of {missing[0]} are in one of the --folds {folds}: too few prompts for it")
    golden = source_P == GOLDEN
    rows = Rows(x_P2D.reshape(len(x_P2D) * 2, -1), np.repeat(golden, 2).astype(np.float64))
    return [_fit_source(rows, golden, source_P == number, fold_P, prompts) for number in range(len(names))]


def _fit_source(
    rows: Rows, golden_P: np.ndarray, source_P: np.ndarray, fold_P: np.ndarray, prompts: list[str]
) -> SourceFit:
    golden_N, source_N, fold_N = (np.repeat(each, 2) for each in (golden_P, source_P, fold_P))
    fit = cross_fit(rows, fold_N, lambda mask: balanced(golden_N & mask, source_N & mask))
    c_N, used = expit(fit.z_N), golden_N | source_N
    value = auc(fit.z_N[golden_N], fit.z_N[source_N])
    weight_N = balanced(golden_N, source_N)[used]
    bins = reliability(c_N[used], rows.y_N[used], weight_N * len(weight_N))
    # Images of a prompt are alike: its prompts are the sample.
    sizes = [len({prompts[row] for row in np.flatnonzero(mask)}) for mask in (golden_P, source_P)]
    error = np.sqrt((sum(sizes) + 1) / (12 * sizes[0] * sizes[1]))
    noise = value - 0.5 < max(_NOISE, 2 * error)
    return SourceFit(c_N.reshape(-1, 2), value, calibration_error(bins), fit.l2, bool(noise))


def balanced(golden_N: np.ndarray, source_N: np.ndarray) -> np.ndarray:
    """Weigh rows so that each class has half of the weight and others have none: float64 [N]."""
    return 0.5 * golden_N / golden_N.sum() + 0.5 * source_N / source_N.sum()


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the share of pairs of a positive and a negative in which the positive is higher; ties count half."""
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    smallest = len(positive) * (len(positive) + 1) / 2
    return float((ranks.sum() - smallest) / (len(positive) * len(negative)))
