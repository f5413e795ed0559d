"""Every reward and every mix, fitted on some prompts and judged on the others."""

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
from smpo_schemas.scores import RewardStatistics

COIN = "p = 0.5"
MINMAX, MIXTURE = "minmax", "mixture"
FITTED = ", tau fitted"
EQUAL_MIXTURE = f"{MIXTURE}, equal weights"
SHARP_MINMAX = f"{MINMAX}, sharpness fitted"


@dataclass(frozen=True)
class Fits:
    """What was learned from some labels.

    Attributes:
        alone: by reward name, tau of the reward by itself.
        fitted, equal: the mixture, with fitted and with equal weights.
        sharpness: what all weights of the even ``minmax`` mix are to be multiplied by.
    """

    alone: dict[str, float]
    fitted: MixtureFit
    equal: MixtureFit
    sharpness: float

    def mixture(self, *, equal_weights: bool) -> MixtureFit:
        """One of the two."""
        return self.equal if equal_weights else self.fitted


@dataclass(frozen=True)
class CrossValidation:
    """Cross-validated predictions.

    Attributes:
        p: by name of a reward or mix, P(image_0 preferred) of every labelled row, float64 [P], each from the fits
            of the folds that the row's prompt is not in; NaN in rows without a label.
        fold_P: the fold of each row, -1 without a label.
        folds: the fits without each fold.
        final: the fits to all labels.
        equal_weights: whether equal weights had the lower held-out log-loss.
    """

    p: dict[str, np.ndarray]
    fold_P: np.ndarray
    folds: list[Fits]
    final: Fits
    equal_weights: bool

    @property
    def chosen(self) -> str:
        """The better of the two mixtures, by its name in ``p``."""
        return EQUAL_MIXTURE if self.equal_weights else MIXTURE

    @property
    def mixture(self) -> MixtureFit:
        """The mixture to use: fitted to all labels, with the weights that did better on held-out prompts."""
        return self.final.mixture(equal_weights=self.equal_weights)


def cross_validate(data: LabelledPairs, folds: int, seed: int, done: Callable[[int], None]) -> CrossValidation:
    """Fit and predict, fold by fold.

    What else takes a calibration is given that of the mixture which did better, as ``smpo-train`` is.

    Args:
        data: scores and labels.
        folds: how many.
        seed: deals the prompts to them.
        done: told how many of ``folds`` + 1 fits are done.

    Raises:
        UserError: too few prompts, or a reward that cannot be used.
    """
    for name, statistics in data.statistics.items():
        score_range(statistics)
        _check_margins(data, name, data.labelled)
    labelled = np.flatnonzero(data.labelled).tolist()
    fold_P = np.full(len(data.labels_P), -1)
    fold_P[labelled] = split_by_prompt([data.prompts[row] for row in labelled], folds, seed)
    unfitted = predict_unfitted(data)
    p: dict[str, np.ndarray] = {}
    found = []
    for fold in range(folds):
        train_P = data.labelled & (fold_P != fold)
        if not (train_P & data.decided).any():
            raise UserError(f"without fold {fold} all labels are ties: too few decided labels for --folds {folds}")
        for name in data.statistics:
            _check_margins(data, name, train_P)
        fits = fit_all(data, train_P)
        found.append(fits)
        for name, p_P in predict(data, fits, unfitted).items():
            p.setdefault(name, np.full(len(fold_P), np.nan))[fold_P == fold] = p_P[fold_P == fold]
        done(fold + 1)
    final = fit_all(data, data.labelled)
    done(folds + 1)
    labels = data.labels_P[labelled]
    equal = EQUAL_MIXTURE in p and log_loss(p[EQUAL_MIXTURE][labelled], labels) < log_loss(p[MIXTURE][labelled], labels)
    for way in _other_ways(data):
        if way.calibration != "refused":
            p[f"{way.name}, calibrated"] = np.full(len(fold_P), np.nan)
            for fold, fits in enumerate(found):
                calibrated = way(*_learned(data, fits.mixture(equal_weights=equal)))
                p[f"{way.name}, calibrated"][fold_P == fold] = calibrated.probability(data.pairs)[fold_P == fold]
    return CrossValidation(p, fold_P, found, final, equal)


def _check_margins(data: LabelledPairs, name: str, rows_P: np.ndarray) -> None:
    scores_P2 = data.pairs.scores[name][rows_P]
    if not (scores_P2[:, 0] != scores_P2[:, 1]).any():
        raise UserError(
            f"reward {name}: it gives both images the same score in all {len(scores_P2)} pairs with a label"
        )


def fit_all(data: LabelledPairs, rows_P: np.ndarray) -> Fits:
    """Fit everything to the labels of some rows (bool [P])."""
    labels = data.labels_P[rows_P]
    scores = {name: scores_P2[rows_P] for name, scores_P2 in data.pairs.scores.items()}
    margins_PK = np.stack([each[:, 0] - each[:, 1] for each in scores.values()], axis=1)
    spread_K = np.array([score_range(each) for each in data.statistics.values()])
    return Fits(
        alone={name: fit_temperature(margins_PK[:, k], labels) for k, name in enumerate(scores)},
        fitted=fit_mixture(margins_PK, labels),
        equal=fit_mixture(margins_PK, labels, equal_weights=True),
        sharpness=1 / fit_temperature((margins_PK / spread_K).sum(axis=1), labels),
    )


def predict_unfitted(data: LabelledPairs) -> dict[str, np.ndarray]:
    """P(image_0 preferred) of every row, by name of a reward or mix that learns nothing: as ``smpo-train`` mixes."""
    pairs, statistics = data.pairs, data.statistics
    even = dict.fromkeys(statistics, 1.0)
    found = {COIN: np.full(len(data.labels_P), 0.5)}
    found |= {name: minmax(pairs.scores, statistics, {name: 1.0}) for name in statistics}
    if len(even) > 1:
        found[MINMAX] = minmax(pairs.scores, statistics, even)
    for way in _other_ways(data):
        if way.calibration != "required":
            found[way.name] = way(even, statistics).probability(pairs)
    return found


def predict(data: LabelledPairs, fits: Fits, unfitted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """P(image_0 preferred) of every row, by name of a reward or mix, in the order in which they are shown."""
    pairs, statistics = data.pairs, data.statistics
    names = list(statistics)
    found = {COIN: unfitted[COIN]}
    for name in names:
        found[name] = unfitted[name]
        found[name + FITTED] = Mixture({name: 1.0}, statistics, {name: fits.alone[name]}).probability(pairs)
    if len(names) > 1:
        found[MINMAX] = unfitted[MINMAX]
        found[SHARP_MINMAX] = minmax(pairs.scores, statistics, dict.fromkeys(names, fits.sharpness))
        found[EQUAL_MIXTURE] = Mixture(*_learned(data, fits.equal)).probability(pairs)
    found[MIXTURE] = Mixture(*_learned(data, fits.fitted)).probability(pairs)
    return found | {name: p_P for name, p_P in unfitted.items() if name not in found}


def _other_ways(data: LabelledPairs) -> list[type[Preference]]:
    """What else ``--preference`` offers and these pairs allow."""
    ways = [way for way in preferences().values() if way.name not in (MINMAX, MIXTURE)]
    return [way for way in ways if data.pairs.images_P2 is not None or not way.needs_images]


def _learned(
    data: LabelledPairs, mixture: MixtureFit
) -> tuple[dict[str, float], Mapping[str, RewardStatistics], dict[str, float]]:
    """What a way of mixing is made of: weights, statistics and temperatures by reward name."""
    weights, taus = (
        dict(zip(data.statistics, each.tolist(), strict=True)) for each in (mixture.weight_K, mixture.tau_K)
    )
    return weights, data.statistics, taus
