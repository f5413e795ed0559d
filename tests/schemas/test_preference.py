from __future__ import annotations

import math

import numpy as np
import pytest

from smpo_schemas.errors import UserError
from smpo_schemas.preference import normalise_scores, preference
from smpo_schemas.scores import reward_statistics


def statistics(scores, labels=None):
    labels = np.full(len(scores), np.nan) if labels is None else np.asarray(labels, dtype=float)
    return reward_statistics(np.asarray(scores), labels, model="m", fingerprint="f", unit="cosine")


def test_statistics_by_hand():
    found = statistics([[0.0, 1.0], [3.0, 2.0], [1.0, 1.0], [4.0, 0.0]], [0.0, 0.0, 1.0, 0.5])
    assert (found.min, found.max, found.mean) == (0.0, 4.0, 1.5)
    assert found.std == pytest.approx(math.sqrt(np.mean((np.array([0, 1, 3, 2, 1, 1, 4, 0]) - 1.5) ** 2)))
    # Decided labels: three; ordered as the label does: the first only (a draw of the reward is no agreement).
    assert (found.agreement, found.num_labelled) == (pytest.approx(1 / 3), 3)
    assert statistics([[0.0, 1.0]]).agreement is None


def test_preference_by_hand():
    scores = {"one": np.array([[0.1, 0.3], [0.5, 0.1]]), "two": np.array([[2.0, 0.0], [1.0, 1.0]])}
    stats = {name: statistics(values) for name, values in scores.items()}
    p = preference(scores, stats, {"one": 1.0, "two": 0.5})
    margins = [(0.0 - 0.5) + 0.5 * (1.0 - 0.0), (1.0 - 0.0) + 0.5 * 0.0]
    np.testing.assert_allclose(p, [1 / (1 + math.exp(-margin)) for margin in margins], rtol=1e-14)


def test_swapping_the_images_gives_the_complement():
    stream = np.random.default_rng(0)
    scores = {"one": stream.normal(size=(50, 2))}
    stats = {"one": statistics(scores["one"])}
    p = preference(scores, stats, {"one": 3.0})
    swapped = preference({"one": scores["one"][:, ::-1]}, stats, {"one": 3.0})
    np.testing.assert_allclose(p + swapped, 1, rtol=1e-14)


def test_published_constants_of_pickscore():
    """With the published code's minimum and maximum, p is sigmoid((s0 - s1) / (max - min))."""
    low, high = 0.11543526500463486, 0.28201571106910706
    stats = {"pickscore": statistics([[low, high]])}
    p = preference({"pickscore": np.array([[0.21, 0.19]])}, stats, {"pickscore": 1.0})
    assert p[0] == pytest.approx(1 / (1 + math.exp(-(0.21 - 0.19) / (high - low))), rel=1e-12)


def test_wrong_use_is_one_line():
    with pytest.raises(UserError, match="'nothing' is not among"):
        preference({}, {}, {"nothing": 1.0})
    with pytest.raises(UserError, match="all images have the score"):
        normalise_scores(np.zeros(2), statistics([[1.0, 1.0]]))
