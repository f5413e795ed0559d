from __future__ import annotations

import math

import numpy as np
import pytest

from smpo_pipeline.calibration.fit import fit_mixture, fit_temperature
from smpo_pipeline.calibration.measures import log_loss
from tests.calibration.helpers import populations


def margins(scores):
    return np.stack([each[:, 0] - each[:, 1] for each in scores.values()], axis=1)


def test_expected_labels_give_back_the_mixture_that_made_them():
    scores, p, _, _ = populations(4000)
    fit = fit_mixture(margins(scores), p)
    np.testing.assert_allclose(fit.tau_K, [0.1, 2.0], rtol=0.01)
    np.testing.assert_allclose(fit.weight_K, [0.7, 0.3], atol=0.003)
    assert fit.weight_K.sum() == pytest.approx(1)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    assert fit.loss == pytest.approx(entropy, abs=1e-5)


def test_drawn_labels_give_back_about_the_same():
    scores, p, _, _ = populations(10_000, seed=3)
    labels = (np.random.default_rng(4).random(len(p)) < p).astype(float)
    fit = fit_mixture(margins(scores), labels)
    # Four standard deviations, as measured over 20 other draws (0.0035, 0.23; 0.0114).
    assert abs(fit.tau_K[0] - 0.1) < 0.014
    assert abs(fit.tau_K[1] - 2.0) < 0.9
    assert abs(fit.weight_K[0] - 0.7) < 0.046


def test_one_temperature_is_the_best_of_a_fine_grid():
    stream = np.random.default_rng(1)
    margin = stream.normal(size=300) * 0.02
    labels = np.where(
        stream.random(300) < 0.1, 0.5, (stream.random(300) < 1 / (1 + np.exp(-margin / 0.03))).astype(float)
    )
    grid = np.geomspace(1e-3, 1, 20001)
    size = math.sqrt(np.mean(margin**2))
    losses = [
        log_loss(1 / (1 + np.exp(-margin / tau)), labels) + math.log(tau / size) ** 2 / (2 * 3**2 * 300) for tau in grid
    ]
    assert fit_temperature(margin, labels) == pytest.approx(grid[int(np.argmin(losses))], rel=4e-4)


def test_loss_by_a_simple_implementation():
    scores, _, labels, _ = populations(50)
    fit = fit_mixture(margins(scores), np.array(labels))
    total = 0.0
    for row, label in zip(margins(scores), labels, strict=True):
        p = sum(w / (1 + math.exp(-m / t)) for w, m, t in zip(fit.weight_K, row, fit.tau_K, strict=True))
        total -= label * math.log(p) + (1 - label) * math.log(1 - p)
    assert fit.loss == pytest.approx(total / 50, rel=1e-12)


def test_equal_weights_stay_equal_and_never_fit_better():
    scores, _, labels, _ = populations(500)
    fit = fit_mixture(margins(scores), np.array(labels), equal_weights=True)
    assert fit.weight_K.tolist() == [0.5, 0.5]
    assert fit.loss >= fit_mixture(margins(scores), np.array(labels)).loss


def test_swapped_images_and_other_units_change_nothing():
    scores, _, labels, _ = populations(400)
    own, labels = margins(scores), np.array(labels)
    fit = fit_mixture(own, labels)
    swap = np.random.default_rng(0).random(400) < 0.5
    other = fit_mixture(np.where(swap[:, None], -own, own) * [1000, 1], np.where(swap, 1 - labels, labels))
    np.testing.assert_allclose(other.tau_K, fit.tau_K * [1000, 1], rtol=1e-5)
    np.testing.assert_allclose(other.weight_K, fit.weight_K, rtol=1e-5)
    # So a data set of winners and losers, whose labels all prefer image_0, gives the same fit.
    winners = fit_mixture(np.where((labels < 0.5)[:, None], -own, own), np.maximum(labels, 1 - labels))
    np.testing.assert_allclose(winners.tau_K, fit.tau_K, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_reward_that_is_always_right_or_always_wrong_has_a_finite_temperature(sign):
    margin = np.linspace(-1, 1, 50)
    tau = fit_temperature(margin, (sign * margin > 0).astype(float))
    assert 0 < tau < math.inf
    assert tau < 0.05 if sign == 1 else tau > 5


def test_a_useless_reward_beside_a_good_one():
    scores, _, _, _ = populations(3000)
    own = margins(scores)
    p = 1 / (1 + np.exp(-own[:, 0] / 0.1))
    fit = fit_mixture(own, p)
    mixed = fit.weight_K[0] / (1 + np.exp(-own[:, 0] / fit.tau_K[0])) + fit.weight_K[1] / (
        1 + np.exp(-own[:, 1] / fit.tau_K[1])
    )
    assert fit.weight_K[0] > 0.95
    assert abs(mixed - p).max() < 0.02
