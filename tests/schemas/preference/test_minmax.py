from __future__ import annotations

import math

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_schemas.preference.base import score_range
from smpo_schemas.preference.minmax import minmax
from tests.schemas.helpers import statistics


def test_by_hand():
    scores = {"one": np.array([[0.1, 0.3], [0.5, 0.1]]), "two": np.array([[2.0, 0.0], [1.0, 1.0]])}
    stats = {name: statistics(values) for name, values in scores.items()}
    p = minmax(scores, stats, {"one": 1.0, "two": 0.5})
    margins = [(0.0 - 0.5) + 0.5 * (1.0 - 0.0), (1.0 - 0.0) + 0.5 * 0.0]
    np.testing.assert_allclose(p, [1 / (1 + math.exp(-margin)) for margin in margins], rtol=1e-14)


def test_swapping_the_images_gives_the_complement():
    stream = np.random.default_rng(0)
    scores = {"one": stream.normal(size=(50, 2))}
    stats = {"one": statistics(scores["one"])}
    p = minmax(scores, stats, {"one": 3.0})
    swapped = minmax({"one": scores["one"][:, ::-1]}, stats, {"one": 3.0})
    np.testing.assert_allclose(p + swapped, 1, rtol=1e-14)


def test_published_constants_of_pickscore():
    """With the published code's minimum and maximum, p is sigmoid((s0 - s1) / (max - min))."""
    low, high = 0.11543526500463486, 0.28201571106910706
    stats = {"pickscore": statistics([[low, high]])}
    p = minmax({"pickscore": np.array([[0.21, 0.19]])}, stats, {"pickscore": 1.0})
    assert p[0] == pytest.approx(1 / (1 + math.exp(-(0.21 - 0.19) / (high - low))), rel=1e-12)


def test_wrong_use_is_one_line():
    with pytest.raises(UserError, match="'nothing'"):
        minmax({}, {}, {"nothing": 1.0})
    with pytest.raises(UserError, match="all images have the score"):
        score_range(statistics([[1.0, 1.0]]))
