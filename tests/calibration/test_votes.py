"""The strength of the votes' prior, and labels weighted by their votes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from smpo_pipeline.calibration.calibrate import calibrate
from smpo_pipeline.calibration.fit import fit_mixture
from smpo_pipeline.calibration.measures import measure
from smpo_pipeline.calibration.votes import fit_strength, fit_votes_prior
from smpo_schemas.preference.votes import DEFAULT_STRENGTH
from tests.calibration.helpers import labelled, populations, write_scores


def log_likelihood(s: float, k: int, n: int, m: float) -> float:
    """Of k of n votes in any fixed order: Polya's urn, vote by vote."""
    total, first, other = 0.0, s * m, s * (1 - m)
    for vote in range(n):
        total += math.log((first if vote < k else other) / (first + other))
        first, other = (first + 1, other) if vote < k else (first, other + 1)
    return total


def draw(strength: float, mean: np.ndarray, votes: np.ndarray, seed: int = 0) -> np.ndarray:
    stream = np.random.default_rng(seed)
    return stream.binomial(votes, stream.beta(strength * mean, strength * (1 - mean))).astype(float)


def test_the_strength_is_the_best_of_a_fine_grid():
    stream = np.random.default_rng(2)
    mean, votes = stream.uniform(0.2, 0.8, size=30), stream.integers(1, 12, size=30)
    for_first = draw(4.0, mean, votes)
    grid = np.geomspace(0.1, 100, 2001)
    losses = [
        math.log(s / DEFAULT_STRENGTH) ** 2 / (2 * 3**2)
        - sum(log_likelihood(s, int(k), int(n), m) for k, n, m in zip(for_first, votes, mean, strict=True))
        for s in grid
    ]
    assert fit_strength(for_first, votes, mean) == pytest.approx(grid[int(np.argmin(losses))], rel=4e-3)


@pytest.mark.parametrize(("strength", "allowed"), [(0.5, 0.13), (3.0, 0.1), (30.0, 0.29)])
def test_drawn_votes_give_back_about_the_strength(strength, allowed):
    """Within four standard deviations, as measured over 20 draws."""
    mean, votes = np.full(4000, 0.5), np.full(4000, 20)
    fitted = fit_strength(draw(strength, mean, votes), votes, 0.5)
    assert fitted == pytest.approx(strength, rel=allowed)


def test_single_votes_leave_the_default():
    assert fit_strength(np.array([1.0, 0.0, 1.0]), np.ones(3), 0.5) == pytest.approx(DEFAULT_STRENGTH, rel=1e-4)


def test_rows_of_one_pair_count_together(tmp_path):
    """Five labels of a pair, two of them of the exchanged images, are five votes."""
    scores = {"one": np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2 + [[0.5, 0.0]])}
    images = [("a", "b")] * 3 + [("b", "a")] * 2 + [("c", "d")]
    data = labelled(tmp_path / "s", scores, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0], ["x"] * 5 + ["y"], images=images)
    p = np.array([0.8] * 3 + [0.2] * 2 + [0.6])
    prior = fit_votes_prior(data, p)
    assert (prior.pairs, prior.votes) == (2, 6)
    assert prior.strength == fit_strength(np.array([4.0, 1.0]), np.array([5.0, 1.0]), 0.5)
    assert prior.mixture_strength == pytest.approx(
        fit_strength(np.array([4.0, 1.0]), np.array([5.0, 1.0]), np.array([0.8, 0.6]))
    )


def test_a_share_of_votes_counts_as_that_many_labels():
    scores, p, _, _ = populations(40)
    margins = np.stack([each[:, 0] - each[:, 1] for each in scores.values()], axis=1)
    votes = np.arange(40) % 4 + 1
    first = np.minimum(np.arange(40) % 3, votes)
    rows = np.repeat(np.arange(40), votes)
    single = np.concatenate([[1.0] * k + [0.0] * (n - k) for k, n in zip(first, votes, strict=True)])
    shares, repeated = fit_mixture(margins, first / votes, votes), fit_mixture(margins[rows], single)
    np.testing.assert_allclose(shares.tau_K, repeated.tau_K, rtol=1e-6)
    np.testing.assert_allclose(shares.weight_K, repeated.weight_K, rtol=1e-6)
    assert shares.loss == pytest.approx(repeated.loss, rel=1e-9)
    one, other = measure(p, first / votes, votes), measure(p[rows], single)
    assert one.log_loss == pytest.approx(other.log_loss, rel=1e-12)
    assert one.calibration_error == pytest.approx(other.calibration_error, rel=1e-12)
    assert [each.labels for each in one.bins] == [each.labels for each in other.bins]


def test_calibrate_writes_the_prior(tmp_path):
    scores, _, labels, prompts = populations(200)
    result = calibrate(write_scores(tmp_path / "s", scores, labels, prompts), [], folds=3, seed=0)
    prior = result.calibration.votes
    assert prior is not None
    assert (prior.pairs, prior.votes) == (200, 200)
    assert prior.strength == pytest.approx(DEFAULT_STRENGTH, rel=1e-4)  # single votes, some of them ties
