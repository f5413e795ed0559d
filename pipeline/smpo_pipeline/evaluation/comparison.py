"""Which model's images score higher, and how sure that is: win rate and mean difference with 95 % intervals.

A prompt's images resemble each other, so the prompt, not the image, is the unit that is drawn at random. Intervals
come from a bootstrap that draws whole prompts: 10,000 resamples with a fixed seed, and percentiles at the expanded
levels of Hesterberg, "What Teachers Should Know About the Bootstrap" (The American Statistician 69, 2015, section
3.4), which fix the plain percentile interval's being too narrow with few prompts.

Shape suffixes: P prompts, I images a prompt, V quantities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 10_000
CONFIDENCE = 0.95
_BOOTSTRAP_SEED = 20_250_602
_CHUNK = 4_000_000  # resampling weights held at once (bounds the memory with many prompts)


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % interval; no interval (None) from a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """One model against another under one reward, image by image (same prompt, same initial noise).

    Attributes:
        win_rate: share of images that score higher than their counterpart, ties counted half.
        mean_difference: mean of score minus counterpart's score, in the reward's unit.
        wins, ties, losses: numbers of images.
    """

    win_rate: Estimate
    mean_difference: Estimate
    wins: int
    ties: int
    losses: int


def compare(scores_PI: np.ndarray, baseline_PI: np.ndarray) -> Comparison:
    """Compare a model with the baseline.

    Args:
        scores_PI: the model's scores, finite; image i of prompt p began from the same noise in both arrays.
        baseline_PI: the baseline's.
    """
    difference_PI = np.asarray(scores_PI, dtype=np.float64) - baseline_PI
    outcome_PI = (np.sign(difference_PI) + 1) / 2
    per_prompt_PV = np.stack([outcome_PI.mean(axis=1), difference_PI.mean(axis=1)], axis=1)
    win_rate, mean_difference = clustered_means(per_prompt_PV)
    return Comparison(
        win_rate=_widen_near_unanimity(win_rate, num_prompts=len(per_prompt_PV)),
        mean_difference=mean_difference,
        wins=int((difference_PI > 0).sum()),
        ties=int((difference_PI == 0).sum()),
        losses=int((difference_PI < 0).sum()),
    )


def clustered_means(per_prompt_PV: np.ndarray) -> list[Estimate]:
    """Mean over prompts of V quantities, each with its bootstrap interval over prompts.

    Args:
        per_prompt_PV: float [P, V], each prompt's own mean (prompts weigh alike).
    """
    num_prompts = len(per_prompt_PV)
    values_V = per_prompt_PV.mean(axis=0)
    if num_prompts == 1:
        return [Estimate(float(value), None, None) for value in values_V]
    level = expanded_level(num_prompts)
    low_V, high_V = np.quantile(_resampled_means(per_prompt_PV), [level, 1 - level], axis=0)
    return [
        Estimate(float(value), float(low), float(high))
        for value, low, high in zip(values_V, low_V, high_V, strict=True)
    ]


def _resampled_means(per_prompt_PV: np.ndarray) -> np.ndarray:
    """Means over P prompts drawn with replacement: float64 [RESAMPLES, V]."""
    num_prompts = len(per_prompt_PV)
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    rows = max(1, _CHUNK // num_prompts)
    means = []
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        weights = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=count)
        means.append(weights @ per_prompt_PV / num_prompts)
    return np.concatenate(means)


def expanded_level(num_prompts: int) -> float:
    """The lower percentile, as a share, that gives a 95 % interval from ``num_prompts`` (at least 2) prompts.

    Phi(-sqrt(n / (n - 1)) t), with t the 97.5 % point of Student's distribution with n - 1 degrees of freedom: 0.025
    for many prompts, smaller for few.
    """
    widening = math.sqrt(num_prompts / (num_prompts - 1))
    return float(ndtr(-widening * stdtrit(num_prompts - 1, 0.5 + CONFIDENCE / 2)))


def _widen_near_unanimity(rate: Estimate, num_prompts: int) -> Estimate:
    """Keep a win rate's interval at least as wide as the exact one of P prompts that all were won, or lost.

    If a prompt is won in all its images with probability q, P prompts all are with q^P. A q for which that is below
    2.5 % is ruled out, and the expected win rate is at least q. Of a unanimous outcome a bootstrap is falsely certain,
    and of one that is nearly so too: what is lost once must not be surer than what is never lost.
    """
    if rate.low is None or rate.high is None:
        return rate
    limit = ((1 - CONFIDENCE) / 2) ** (1 / num_prompts)
    # Of few prompts the limits cross: a draw is near neither end.
    if rate.value >= limit and rate.value > 1 / 2:
        return Estimate(rate.value, min(rate.low, limit), rate.high)
    if rate.value <= 1 - limit and rate.value < 1 / 2:
        return Estimate(rate.value, rate.low, max(rate.high, 1 - limit))
    return rate
