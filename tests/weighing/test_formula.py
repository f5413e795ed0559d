from __future__ import annotations

import numpy as np
import pytest

from smpo_pipeline.weighing.formula import GOLDEN, effective_size, image_weights, pair_weights


def weight(c, alpha=0.5, alpha_i=0.5):
    return image_weights(np.full((1, 2, 1), c), np.array([0]), alpha, np.array([alpha_i]))[0, 0]


@pytest.mark.parametrize(("c", "expected"), [(0.5, 1.0), (0.9, 1.8), (0.1, 0.2), (1.0, 2 / (1 + 1e-4 / (1 - 1e-4)))])
def test_values_by_hand(c, expected):
    assert weight(c) == pytest.approx(expected, rel=1e-12)


def test_limits():
    assert weight(1.0) == pytest.approx(2, rel=2e-4)
    assert weight(1.0, 0.25, 0.75) == pytest.approx(4, rel=4e-4)
    assert weight(0.0) == pytest.approx(2e-4, rel=1e-3)
    rising = [weight(c) for c in np.linspace(0, 1, 50)]
    assert (np.diff(rising[1:-1]) > 0).all()


def test_shares_of_several_sources():
    """Shares 1/5 golden, 1/2 and 3/10: each image with its own source, golden ones with all."""
    c = np.array([[[0.8, 0.4]] * 2] * 3)
    found = image_weights(c, np.array([GOLDEN, 0, 1]), 0.2, np.array([0.5, 0.3]))
    first, second = 0.5 * 0.25, 0.3 * 1.5
    np.testing.assert_allclose(found[:, 0], [1 / (0.2 + first + second), 1 / (0.2 + first), 1 / (0.2 + second)])
    assert weight(0.75, 0.1, 0.9) == pytest.approx(1 / (0.1 + 0.9 / 3))


def test_a_pair_has_the_mean_of_its_images():
    images = np.array([[1.0, 3.0], [0.0, 2.0]])
    np.testing.assert_array_equal(pair_weights(images, normalise=False), [2.0, 1.0])
    np.testing.assert_allclose(pair_weights(images, normalise=True), [4 / 3, 2 / 3])
    assert effective_size(np.array([2.0, 1.0])) == pytest.approx(9 / 5)
