from __future__ import annotations

import math

import numpy as np
import pytest

from smpo_pipeline.evaluation.comparison import clustered_means, compare, expanded_level


def test_wins_ties_and_losses_by_hand() -> None:
    baseline = np.array([[1.0, 1.0], [1.0, 1.0]])
    scores = np.array([[2.0, 1.0], [0.0, 4.0]])
    found = compare(scores, baseline)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.win_rate.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.mean_difference.value == pytest.approx((1 + 0 - 1 + 3) / 4)


def test_a_model_against_itself_ties() -> None:
    scores = np.random.default_rng(0).random((9, 4))
    found = compare(scores, scores)
    assert found.win_rate.value == found.win_rate.low == found.win_rate.high == 0.5
    assert found.ties == 36


def test_interval_of_two_prompts_by_hand() -> None:
    # The mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4: both tails reach the ends.
    (estimate,) = clustered_means(np.array([[0.0], [1.0]]))
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


def test_interval_matches_the_exact_distribution_of_resampled_means() -> None:
    # 8 prompts of which 4 win: the resampled mean is Binomial(8, 1/2) / 8, whose quantiles can be computed.
    (estimate,) = clustered_means(np.array([[0.0], [1.0]] * 4))
    cumulative = np.cumsum([math.comb(8, k) / 2**8 for k in range(9)])
    low = int(np.searchsorted(cumulative, expanded_level(8))) / 8
    assert estimate.low == pytest.approx(low)
    assert estimate.high == pytest.approx(1 - low)


def test_level_widens_with_few_prompts_and_tends_to_the_usual_one() -> None:
    # Student's 97.5 % point with 9 degrees of freedom is 2.262157.
    expected = 0.5 * math.erfc(math.sqrt(10 / 9) * 2.262157 / math.sqrt(2))
    assert expanded_level(10) == pytest.approx(expected, rel=1e-5)
    assert expanded_level(100_000) == pytest.approx(0.025, abs=1e-5)
    assert expanded_level(2) < expanded_level(3) < expanded_level(4) < expanded_level(64) < 0.025


def test_the_prompt_is_the_unit() -> None:
    # The same 16 images, as 16 prompts and as 4 prompts whose images agree: fewer prompts give a wider interval.
    outcomes = np.array([1.0, 0.0] * 8)
    apart = compare(outcomes.reshape(16, 1), np.full((16, 1), 0.5)).win_rate
    together = compare(np.repeat([[1.0], [0.0], [1.0], [0.0]], 4, axis=1), np.full((4, 4), 0.5)).win_rate
    assert apart.value == together.value == 0.5
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


@pytest.mark.slow
def test_coverage_by_simulation() -> None:
    # Prompts differ (a beta-distributed chance of winning each), with 8 images a prompt; the truth is 2/3.
    rng = np.random.default_rng(5)
    for num_prompts, least in ((16, 0.92), (64, 0.93)):
        chances = rng.beta(2, 1, size=(num_prompts, 1500))
        estimates = clustered_means(rng.binomial(8, chances) / 8)
        covered = np.mean([each.low <= 2 / 3 <= each.high for each in estimates])
        assert least < covered < 0.97


def test_an_interval_by_images_would_not_cover() -> None:
    # The check above can fail: with the 8 images of a prompt treated as independent, coverage is far too low.
    rng = np.random.default_rng(6)
    rates = (rng.binomial(8, rng.beta(0.6, 0.3, size=(16, 1500))) / 8).mean(axis=0)
    half_width = 1.96 * np.sqrt(rates * (1 - rates) / (16 * 8))
    assert np.mean(np.abs(rates - 2 / 3) <= half_width) < 0.85


@pytest.mark.slow
def test_losing_once_is_not_surer_than_never() -> None:
    scores = np.ones((64, 1))
    found = [compare(np.where(np.arange(64)[:, None] < losses, -scores, scores), 0 * scores) for losses in range(33)]
    rates = [each.win_rate for each in found]
    assert [rate.low for rate in rates] == sorted((rate.low for rate in rates), reverse=True)
    mirrored = [compare(0 * scores, np.where(np.arange(64)[:, None] < n, -scores, scores)).win_rate for n in range(33)]
    np.testing.assert_allclose([rate.low for rate in rates], [1 - rate.high for rate in mirrored])
    # Only the ends are widened: 63 of 64 wins get the limit of 64 of 64, 60 of 64 their own.
    assert rates[1].low == rates[0].low == pytest.approx(0.025 ** (1 / 64))
    assert rates[4].low < rates[1].low


def test_winning_everything_is_not_certain() -> None:
    found = compare(np.ones((8, 2)), np.zeros((8, 2))).win_rate
    assert found.value == found.high == 1
    assert found.low == pytest.approx(0.025 ** (1 / 8))
    lost = compare(np.zeros((8, 2)), np.ones((8, 2))).win_rate
    assert (lost.low, lost.high) == (0, pytest.approx(1 - 0.025 ** (1 / 8)))


def test_one_prompt_has_no_interval() -> None:
    found = compare(np.ones((1, 4)), np.zeros((1, 4)))
    assert found.win_rate.value == 1
    assert found.win_rate.low is None
    assert found.mean_difference.high is None


def test_intervals_are_reproducible() -> None:
    scores = np.random.default_rng(0).random((2, 20, 3))
    assert compare(scores[0], scores[1]) == compare(scores[0], scores[1])
