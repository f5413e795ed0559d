"""Fit every reward and mix on some prompts and predict the labels of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from smpo_common.errors import UserError
from smpo_pipeline.calibration.fit import MixtureFit, fit_mixture, fit_temperature
from smpo_pipeline.calibration.folds import split_by_prompt
from smpo_pipeline.calibration.labels import LabelledPairs
from smpo_pipeline.calibration.measures import log_loss
from smpo_schemas.preference import Preference, preferences
from smpo_schemas.preference.base import score_range
from smpo_schemas.preference.minmax import minmax
from smpo_schemas.preference.mixture import Mixture
from smpo_schemas.scoring.scores import RewardStatistics

COIN = "p = 0.5"
MINMAX, MIXTURE = "minmax", "mixture"
FITTED = ", tau fitted"
EQUAL_MIXTURE = f"{MIXTURE}, equal weights"
SHARP_MINMAX = f"{MINMAX}, sharpness fitted"


@dataclass(frozen=True)
class Fits:
    """Parameters fitted to some labels.

    Attributes:
        alone: by reward name, tau of the reward by itself.
        fitted, equal: the mixture, with fitted and with equal weights.
        sharpness: factor for all weights of the ``minmax`` mix with weights 1.
    """

    alone: dict[str, float]
    fitted: MixtureFit
    equal: MixtureFit
    sharpness: float

    def mixture(self, *, equal_weights: bool) -> MixtureFit:
        """Return ``equal`` or ``fitted``."""
        return self.equal if equal_weights else self.fitted


@dataclass(frozen=True)
class CrossValidation:
    """Cross-validated predictions.

    Attributes:
        p: by name of a reward or mix, P(image_0 preferred), float64 [P], each predicted by a fit without the row's
            fold; NaN in rows without a label.
        fold_P: the fold of each row, -1 without a label.
        folds: for each fold, the fit to the other folds.
        final: the fit to all labels.
        equal_weights: whether equal weights had the lower held-out log-loss.
    """

    p: dict[str, np.ndarray]
    fold_P: np.ndarray
    folds: list[Fits]
    final: Fits
    equal_weights: bool

    @property
    def chosen(self) -> str:
        """The name in ``p`` of the mixture with the lower held-out log-loss."""
        return EQUAL_MIXTURE if self.equal_weights else MIXTURE

    @property
    def mixture(self) -> MixtureFit:
        """The mixture with the lower held-out log-loss, fitted to all labels."""
        return self.final.mixture(equal_weights=self.equal_weights)


def cross_validate(data: LabelledPairs, folds: int, seed: int, done: Callable[[int], None]) -> CrossValidation:
    """Fit and predict, fold by fold.

    Other mixes that take a calibration get the chosen mixture's, as in ``smpo-train``.

    Args:
        data: scores and labels.
        folds: number of folds.
        seed: assigns the prompts to folds.
        done: called with the number of finished fits, of ``folds`` + 1.

    Raises:
        UserError: there are too few prompts, or a reward does not tell images apart.
    """
    for name, statistics in data.statistics.items():
        score_range(statistics)
        _check_margins(data, name, data.labelled)
    labelled = np.flatnonzero(data.labelled).tolist()
    fold_P = np.full(len(data.labels_P), -1)
    fold_P[labelled] = split_by_prompt([data.prompts[row] for row in labelled], folds, seed)
    unfitted = predict_unfitted(data)
    p: dict[str, np.ndarray] = {}
    fold_fits = []
    for fold in range(folds):
        train_P = data.labelled & (fold_P != fold)
        if not (train_P & data.decided).any():
            raise UserError(f"without fold {fold} all labels are ties: too few decided labels for --folds {folds}")
        for name in data.statistics:
            _check_margins(data, name, train_P)
        fits = fit_all(data, train_P)
        fold_fits.append(fits)
        for name, p_P in predict(data, fits, unfitted).items():
            p.setdefault(name, np.full(len(fold_P), np.nan))[fold_P == fold] = p_P[fold_P == fold]
        done(fold + 1)
    final = fit_all(data, data.labelled)
    done(folds + 1)
    truth = data.labels_P[labelled], data.votes_P[labelled]
    equal = EQUAL_MIXTURE in p and log_loss(p[EQUAL_MIXTURE][labelled], *truth) < log_loss(p[MIXTURE][labelled], *truth)
    for mix in _other_mixes(data):
        if mix.calibration != "refused":
            p[f"{mix.name}, calibrated"] = np.full(len(fold_P), np.nan)
            for fold, fits in enumerate(fold_fits):
                calibrated = mix(*_parameters(data, fits.mixture(equal_weights=equal)))
                p[f"{mix.name}, calibrated"][fold_P == fold] = calibrated.probability(data.pairs)[fold_P == fold]
    return CrossValidation(p, fold_P, fold_fits, final, equal)


def _check_margins(data: LabelledPairs, name: str, rows_P: np.ndarray) -> None:
    scores_P2 = data.pairs.scores[name][rows_P]
    if not (scores_P2[:, 0] != scores_P2[:, 1]).any():
        raise UserError(f"reward {name} gives both images the same score in all {len(scores_P2)} pairs with a label")


def fit_all(data: LabelledPairs, rows_P: np.ndarray) -> Fits:
    """Fit everything to the labels of the rows that ``rows_P`` (bool [P]) selects."""
    truth = data.labels_P[rows_P], data.votes_P[rows_P]
    scores = {name: scores_P2[rows_P] for name, scores_P2 in data.pairs.scores.items()}
    margins_PK = np.stack([scores_P2[:, 0] - scores_P2[:, 1] for scores_P2 in scores.values()], axis=1)
    range_K = np.array([score_range(statistics) for statistics in data.statistics.values()])
    return Fits(
        alone={name: fit_temperature(margins_PK[:, k], *truth) for k, name in enumerate(scores)},
        fitted=fit_mixture(margins_PK, *truth),
        equal=fit_mixture(margins_PK, *truth, equal_weights=True),
        sharpness=1 / fit_temperature((margins_PK / range_K).sum(axis=1), *truth),
    )


def predict_unfitted(data: LabelledPairs) -> dict[str, np.ndarray]:
    """Predict P(image_0 preferred) of every row, by name of each reward and mix that needs no fit."""
    pairs, statistics = data.pairs, data.statistics
    even = dict.fromkeys(statistics, 1.0)
    p = {COIN: np.full(len(data.labels_P), 0.5)}
    p |= {name: minmax(pairs.scores, statistics, {name: 1.0}) for name in statistics}
    if len(even) > 1:
        p[MINMAX] = minmax(pairs.scores, statistics, even)
    for mix in _other_mixes(data):
        if mix.calibration != "required":
            p[mix.name] = mix(even, statistics).probability(pairs)
    return p


def predict(data: LabelledPairs, fits: Fits, unfitted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Predict P(image_0 preferred) of every row, by name of a reward or mix, in the order of the report."""
    pairs, statistics = data.pairs, data.statistics
    names = list(statistics)
    p = {COIN: unfitted[COIN]}
    for name in names:
        p[name] = unfitted[name]
        p[name + FITTED] = Mixture({name: 1.0}, statistics, {name: fits.alone[name]}).probability(pairs)
    if len(names) > 1:
        p[MINMAX] = unfitted[MINMAX]
        p[SHARP_MINMAX] = minmax(pairs.scores, statistics, dict.fromkeys(names, fits.sharpness))
        p[EQUAL_MIXTURE] = Mixture(*_parameters(data, fits.equal)).probability(pairs)
    p[MIXTURE] = Mixture(*_parameters(data, fits.fitted)).probability(pairs)
    return p | {name: p_P for name, p_P in unfitted.items() if name not in p}


def _other_mixes(data: LabelledPairs) -> list[type[Preference]]:
    """List the mixes besides ``minmax`` and ``mixture`` that these pairs allow, and that do not use the labels."""
    mixes = [mix for mix in preferences().values() if mix.name not in (MINMAX, MIXTURE) and not mix.uses_labels]
    return [mix for mix in mixes if data.pairs.images_P2 is not None or not mix.needs_images]


def _parameters(
    data: LabelledPairs, mixture: MixtureFit
) -> tuple[dict[str, float], Mapping[str, RewardStatistics], dict[str, float]]:
    """Return a mix's constructor arguments: weights, statistics and temperatures by reward name."""
    weights = dict(zip(data.statistics, mixture.weight_K.tolist(), strict=True))
    taus = dict(zip(data.statistics, mixture.tau_K.tolist(), strict=True))
    return weights, data.statistics, taus
