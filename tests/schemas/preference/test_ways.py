"""Properties of every reward mix, and of the mixture's groups."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_schemas.preference import ScoredPairs, find_preference, preferences
from smpo_schemas.preference.minmax import minmax
from smpo_schemas.preference.mixture import Mixture
from tests.schemas.helpers import statistics

WEIGHTS = {"one": 0.7, "two": 2.1}
TAUS = {"one": 0.05, "two": 3.0}


@pytest.fixture
def pairs():
    """60 pairs of 9 prompts, up to 40 images; scores are those of the images."""
    stream = np.random.default_rng(5)
    prompt = stream.integers(9, size=60)
    image = np.array([stream.choice(5, size=2, replace=False) for _ in range(60)])
    scores = {name: stream.normal(size=(9, 5)) * size for name, size in (("one", 0.1), ("two", 4.0))}
    return ScoredPairs(
        {name: np.stack([each[prompt, image[:, i]] for i in (0, 1)], axis=1) for name, each in scores.items()},
        [f"prompt {number}" for number in prompt],
        np.array([[f"{n}-{i}" for i in two] for n, two in zip(prompt, image, strict=True)]),
        stream.choice([0.0, 0.25, 0.5, 1.0], size=60),
        stream.choice([1.0, 4.0, np.nan], size=60),
    )


def make(name, pairs, weights=WEIGHTS):
    way = find_preference(name)
    stats = {each: statistics(scores) for each, scores in pairs.scores.items()}
    return way(weights, stats, TAUS if way.calibration == "required" else None, way.strength_of(None))


def test_all_are_found():
    assert set(preferences()) >= {"minmax", "mixture", "votes", "votes-mixture", "winrate"}
    with pytest.raises(UserError, match="--preference nonsense.*minmax, mixture, votes, votes-mixture, winrate"):
        find_preference("nonsense")


def test_one_that_extends_another_is_found_too():
    class Sharper(Mixture):
        name = "sharper"

    class Unnamed(Mixture):
        """A base class that several mixes may share."""

    try:
        found = preferences()
        assert found.pop("sharper") is Sharper
        assert {name: way.name for name, way in found.items()} == {name: name for name in found}
        assert found["mixture"] is Mixture
    finally:
        del Sharper, Unnamed, found
        gc.collect()  # __subclasses__ lists classes until they are collected
    assert "sharper" not in preferences()


@pytest.mark.parametrize("name", sorted(preferences()))
def test_swapping_the_images_gives_the_complement(name, pairs):
    swapped = ScoredPairs(
        {each: scores[:, ::-1] for each, scores in pairs.scores.items()},
        pairs.prompts,
        pairs.images_P2[:, ::-1],
        1 - pairs.labels_P,
        pairs.votes_P,
    )
    mix = make(name, pairs)
    p = mix.probability(pairs)
    assert p.dtype == np.float64
    assert ((p > 0) & (p < 1)).all()
    assert p.std() > 0.01
    np.testing.assert_allclose(p + mix.probability(swapped), 1, rtol=1e-14)


@pytest.mark.parametrize("name", sorted(preferences()))
def test_the_order_of_pairs_and_rewards_does_not_matter(name, pairs):
    order = np.random.default_rng(1).permutation(60)
    shuffled = ScoredPairs(
        {each: pairs.scores[each][order] for each in ("two", "one")},
        [pairs.prompts[row] for row in order],
        pairs.images_P2[order],
        pairs.labels_P[order],
        pairs.votes_P[order],
    )
    p = make(name, pairs).probability(pairs)
    other = make(name, pairs, {"two": 2.1, "one": 0.7}).probability(shuffled)
    np.testing.assert_allclose(other, p[order], rtol=1e-13)


@pytest.mark.parametrize("name", sorted(preferences()))
def test_an_unknown_reward_is_one_line(name, pairs):
    with pytest.raises(UserError, match="'nothing'.*scored"):
        make(name, pairs, {"nothing": 1.0})


def test_mixture_by_hand():
    """Weights 1/4 and 3/4; margins 2 tau and -tau, then a pair with margins 0."""
    scores = {"one": np.array([[0.3, 0.2], [1.0, 1.0]]), "two": np.array([[1.0, 4.0], [2.0, 2.0]])}
    stats = {name: statistics(each) for name, each in scores.items()}
    mix = Mixture({"one": 1.0, "two": 3.0}, stats, {"one": 0.05, "two": 3.0})
    assert mix.weights == {"one": 0.25, "two": 0.75}
    expected = [0.25 / (1 + math.exp(-2.0)) + 0.75 / (1 + math.exp(1.0)), 0.5]
    np.testing.assert_allclose(mix.probability(ScoredPairs(scores)), expected, rtol=1e-14)


def test_mixture_of_one_reward_is_its_sigmoid(pairs):
    stats = {name: statistics(scores) for name, scores in pairs.scores.items()}
    alone = Mixture({"two": 0.4}, stats, {"two": stats["two"].max - stats["two"].min}).probability(pairs)
    np.testing.assert_allclose(alone, minmax(pairs.scores, stats, {"two": 1.0}), rtol=1e-14)


def test_certain_groups_that_disagree_give_one_half():
    scores = {"one": np.array([[1.0, 0.0]]), "two": np.array([[0.0, 1.0]])}
    stats = {name: statistics(each) for name, each in scores.items()}
    mix = Mixture({"one": 1.0, "two": 1.0}, stats, {"one": 1e-4, "two": 1e-4})
    np.testing.assert_allclose(mix.probability(ScoredPairs(scores)), [0.5], rtol=1e-14)


def test_weights_are_checked(pairs):
    with pytest.raises(UserError, match="--reward two:-1:"):
        make("mixture", pairs, {"one": 1.0, "two": -1.0})
    with pytest.raises(UserError, match="the weights are all 0"):
        make("winrate", pairs, {"one": 0.0})
    with pytest.raises(UserError, match="'one' .*calibrated.*two"):
        Mixture({"one": 1.0}, {"one": statistics([[0.0, 1.0]])}, {"two": 1.0})
