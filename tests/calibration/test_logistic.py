"""The regression against a plain one by Newton's method, and values by hand."""

from __future__ import annotations

import numpy as np
import pytest

from smpo_pipeline.calibration import logistic
from smpo_pipeline.calibration.logistic import Objective, Rows, cross_fit


def newton(x, y, weight, l2, offset=0.0, intercept=True):
    """Minimise sum w [log(1 + exp z) - y z] + l2/2 |s v|^2 by Newton's method; returns v and b."""
    mean = np.average(x, axis=0, weights=weight) if intercept else np.zeros(x.shape[1])
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weight))
    design = np.column_stack([x, np.ones(len(x))]) if intercept else x
    penalty = np.append(l2 * spread**2, [0.0] if intercept else [])
    theta = np.zeros(design.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-(design @ theta + offset)))
        gradient = design.T @ (weight * (p - y)) + penalty * theta
        hessian = (design.T * (weight * p * (1 - p))) @ design + np.diag(penalty)
        theta = theta - np.linalg.solve(hessian, gradient)
    return (theta[:-1], theta[-1]) if intercept else (theta, 0.0)


@pytest.fixture
def data():
    stream = np.random.default_rng(0)
    x = stream.normal(size=(200, 3)) * [1.0, 20.0, 0.05] + [0.0, 5.0, 3.0]
    y = (stream.random(200) < 1 / (1 + np.exp(-(x[:, 0] + 0.05 * x[:, 1])))).astype(float)
    y[::9] = 0.5
    return x, y, stream.random(200) / 200, stream.normal(size=200)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_equals_newtons_method(data, l2, intercept, monkeypatch):
    monkeypatch.setattr(logistic, "_BLOCK", 64)
    x, y, weight, offset = data
    objective = Objective.of(Rows(x.astype(np.float32), y, offset, intercept), weight, l2)
    found = objective.unscaled(objective.minimise())
    v, b = newton(x.astype(np.float32).astype(float), y, weight, l2, offset, intercept)
    np.testing.assert_allclose(found.v_D, v, rtol=1e-4, atol=1e-7)
    assert found.b == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_value_and_gradient_by_hand():
    """One feature, rows x = 1 (y = 1) and x = 2 (y = 0), weights 1 and 3, no intercept: s = sqrt(13 / 4)."""
    rows = Rows(np.array([[1.0], [2.0]]), np.array([1.0, 0.0]), intercept=False)
    objective = Objective.of(rows, np.array([1.0, 3.0]), 2.0)
    value, gradient = objective(np.zeros(1))
    assert value == pytest.approx(4 * np.log(2))
    assert gradient == pytest.approx((0.5 * 3 * 2 - 0.5) / np.sqrt(13 / 4))
    u = np.array([np.sqrt(13 / 4)])  # v = 1
    value, gradient = objective(u)
    first, second = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))
    assert value == pytest.approx(-np.log(first) - 3 * np.log(1 - second) + 13 / 4)
    assert gradient == pytest.approx((first - 1 + 6 * second) / np.sqrt(13 / 4) + 2 * np.sqrt(13 / 4))


def test_a_constant_feature_changes_nothing(data):
    x, y, weight, _ = data
    with_constant = np.column_stack([x, np.full(200, np.float32(0.1))])
    one, other = (Objective.of(Rows(each, y), weight, 0.01) for each in (x, with_constant))
    fitted = other.unscaled(other.minimise())
    assert fitted.v_D[3] == 0
    np.testing.assert_allclose(fitted.v_D[:3], one.unscaled(one.minimise()).v_D, rtol=1e-5)


def test_a_row_is_predicted_by_a_fit_that_has_not_seen_its_fold(data):
    x, y, weight, _ = data
    fold = np.arange(200) % 4
    before = cross_fit(Rows(x, y), fold, lambda mask: weight * mask)
    for number in range(4):
        expected = newton(x[fold != number], y[fold != number], weight[fold != number], before.l2)
        here = fold == number
        np.testing.assert_allclose(before.z_N[here], x[here] @ expected[0] + expected[1], rtol=1e-3, atol=1e-5)


def test_the_penalty_is_the_one_with_the_lowest_held_out_loss(data, monkeypatch):
    x, y, weight, _ = data
    fold, losses = np.arange(200) % 4, {}
    for l2 in logistic.PENALTIES:
        monkeypatch.setattr(logistic, "PENALTIES", (l2,))
        losses[l2] = cross_fit(Rows(x, y), fold, lambda mask: weight * mask).loss
    monkeypatch.undo()
    assert cross_fit(Rows(x, y), fold, lambda mask: weight * mask).l2 == min(losses, key=losses.__getitem__)
    shuffled = np.random.default_rng(1).permutation(y)
    assert cross_fit(Rows(x, shuffled), fold, lambda mask: weight * mask).l2 >= 1
