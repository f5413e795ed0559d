from __future__ import annotations

import math

import numpy as np
import pytest

from smpo_pipeline.calibration.measures import agreement, calibration_error, log_loss, measure, reliability

P = np.array([0.9, 0.2, 0.5, 0.62, 0.64])
LABELS = np.array([1.0, 0.5, 1.0, 0.0, 1.0])


def test_log_loss_by_hand():
    expected = (
        -(math.log(0.9) + 0.5 * (math.log(0.2) + math.log(0.8)) + math.log(0.5) + math.log(0.38) + math.log(0.64)) / 5
    )
    assert log_loss(P, LABELS) == pytest.approx(expected, rel=1e-14)
    assert log_loss(np.full(4, 0.5), np.array([0, 1, 0.5, 1])) == pytest.approx(math.log(2), rel=1e-14)
    assert log_loss(np.array([0.0]), np.array([1.0])) == pytest.approx(-math.log(1e-12))


def test_agreement_by_hand():
    """Of four decided labels, those with p 0.9 and 0.64 agree, 0.62 does not, and 0.5 prefers neither image."""
    assert agreement(P, LABELS) == (2, 4)
    assert measure(np.array([0.7]), np.array([0.5])).agreement is None


def test_reliability_by_hand():
    bins = reliability(P, LABELS)
    assert [(round(each.start, 9), each.labels) for each in bins] == [(0.5, 1), (0.6, 2), (0.8, 1), (0.9, 1)]
    assert [each.mean_p for each in bins] == pytest.approx([0.5, 0.63, 0.8, 0.9])
    # A p of 0.5 prefers neither image: the share that chose it is one half.
    assert [each.share_chosen for each in bins] == [0.5, 0.5, 0.5, 1.0]
    assert calibration_error(bins) == pytest.approx((0 + 2 * 0.13 + 0.3 + 0.1) / 5)


def test_the_edges_of_bins():
    bins = reliability(np.array([1.0, 0.0, 0.95, 0.55]), np.ones(4))
    assert [(round(each.start, 9), each.labels) for each in bins] == [(0.55, 1), (0.95, 3)]


def test_swapping_the_images_changes_no_measure():
    stream = np.random.default_rng(0)
    p, labels = stream.random(200), stream.choice([0, 0.5, 1], size=200)
    swap = stream.random(200) < 0.5
    one, other = measure(p, labels), measure(np.where(swap, 1 - p, p), np.where(swap, 1 - labels, labels))
    assert other.log_loss == pytest.approx(one.log_loss, rel=1e-12)
    assert other.calibration_error == pytest.approx(one.calibration_error, rel=1e-9)
    assert other.agreement == one.agreement


def test_true_probabilities_have_only_chance_calibration_error():
    stream = np.random.default_rng(1)
    p = stream.random(200_000)
    assert measure(p, (stream.random(200_000) < p).astype(float)).calibration_error < 0.005
    assert measure(p**2 / (p**2 + (1 - p) ** 2), (stream.random(200_000) < p).astype(float)).calibration_error > 0.08
