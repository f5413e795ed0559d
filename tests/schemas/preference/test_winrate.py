from __future__ import annotations

import math

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_schemas.preference import ScoredPairs, winrate
from smpo_schemas.preference.minmax import minmax
from smpo_schemas.preference.winrate import WinRate
from tests.schemas.helpers import statistics


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_three_images_by_hand():
    """Images a, b, c of one prompt score 0, 1, 4; the range is 4. Pairs (a, b), (c, a)."""
    scores = {"r": np.array([[0.0, 1.0], [4.0, 0.0]])}
    pairs = ScoredPairs(scores, ["x", "x"], np.array([["a", "b"], ["c", "a"]]))
    a = (s(-1 / 4) + s(-1)) / 2
    b = (s(1 / 4) + s(-3 / 4)) / 2
    c = (s(1) + s(3 / 4)) / 2
    p = WinRate({"r": 5.0}, {"r": statistics(scores["r"])}).probability(pairs)
    np.testing.assert_allclose(p, [(1 + a - b) / 2, (1 + c - a) / 2], rtol=1e-14)


def plain(pairs, weights, scales):
    """Loops, in float64."""
    seen = {}
    for row, prompt in enumerate(pairs.prompts):
        for i in (0, 1):
            seen.setdefault(prompt, {})[str(pairs.images_P2[row, i])] = {n: pairs.scores[n][row, i] for n in weights}
    result = []
    for row, prompt in enumerate(pairs.prompts):
        total = 0.0
        for name, weight in weights.items():
            rates = []
            for i in (0, 1):
                mine = str(pairs.images_P2[row, i])
                others = [scores[name] for image, scores in seen[prompt].items() if image != mine]
                won = [s((seen[prompt][mine][name] - other) / scales[name]) for other in others]
                rates.append(sum(won) / len(won))
            total += weight / sum(weights.values()) * (1 + rates[0] - rates[1]) / 2
        result.append(total)
    return result


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_equals_a_simple_implementation(monkeypatch, at_once):
    """Images in several pairs, files under two prompts, two rewards; also one comparison at a time."""
    monkeypatch.setattr(winrate, "_COMPARISONS_AT_ONCE", at_once)
    stream = np.random.default_rng(2)
    table = {name: stream.normal(size=(6, 7)) for name in ("one", "two")}
    prompt = stream.integers(6, size=80)
    image = np.array([stream.choice(7, size=2, replace=False) for _ in range(80)])
    scores = {name: np.stack([each[prompt, image[:, i]] for i in (0, 1)], axis=1) for name, each in table.items()}
    pairs = ScoredPairs(scores, [f"p{n}" for n in prompt], image.astype(str))
    weights, scales = {"one": 1.0, "two": 3.0}, {"one": 0.2, "two": 2.0}
    stats = {name: statistics(each) for name, each in scores.items()}
    np.testing.assert_allclose(
        WinRate(weights, stats, scales).probability(pairs), plain(pairs, weights, scales), rtol=1e-13
    )


def test_with_two_images_it_is_the_sigmoid_of_minmax():
    scores = {"r": np.array([[0.0, 1.0], [0.3, 0.2], [0.5, 0.5]])}
    pairs = ScoredPairs(scores, ["x", "y", "z"], np.array([["a", "b"], ["a", "c"], ["d", "d"]]))
    stats = {"r": statistics(scores["r"])}
    p = WinRate({"r": 1.0}, stats).probability(pairs)
    np.testing.assert_allclose(p, minmax(scores, stats, {"r": 1.0}), rtol=1e-14)
    # The third pair shows one image twice.
    assert p[2] == 0.5


def test_needs_names():
    scores = {"r": np.array([[0.0, 1.0]])}
    with pytest.raises(UserError, match="--preference winrate .*smpo-pipeline score"):
        WinRate({"r": 1.0}, {"r": statistics(scores["r"])}).probability(ScoredPairs(scores, ["x"]))
