"""Win rate and mean difference of two models' scores, with 95 % intervals.

Images of one prompt resemble each other, so that the sampling unit is the prompt, not the image. Intervals come from a
bootstrap over whole prompts: 10,000 resamples with a fixed seed, and percentiles at the expanded levels of Hesterberg,
"What Teachers Should Know About the Bootstrap" (The American Statistician 69, 2015, section 3.4), since the usual
percentile interval is too narrow with few prompts.

Shape suffixes: P prompts, I images per prompt, V quantities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 10_000
CONFIDENCE = 0.95
_BOOTSTRAP_SEED = 20_250_602
_CHUNK = 4_000_000  # resampling weights in memory at once, which bounds the memory with many prompts


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95 % interval, which is None with a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """One model against another under one reward, image by image (same prompt, same initial noise).

    Attributes:
        win_rate: share of images that score higher than the other model's image; ties count half.
        mean_difference: mean of score minus the other image's score, in the reward's unit.
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
        scores_PI: the model's scores, finite; image i of prompt p starts from the same noise in both arrays.
        baseline_PI: the baseline's scores.
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
    """Average V quantities over prompts, each with its bootstrap interval over prompts.

    Args:
        per_prompt_PV: float [P, V], each prompt's mean; prompts have equal weights.
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
    """Average over P prompts drawn with replacement, once per resample: float64 [RESAMPLES, V]."""
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
    """Compute the lower quantile's level for a 95 % interval from ``num_prompts`` (at least 2) prompts.

    It is Phi(-sqrt(n / (n - 1)) t), with t the 97.5 % quantile of Student's t with n - 1 degrees of freedom: 0.025 for
    many prompts, less for few.
    """
    widening = math.sqrt(num_prompts / (num_prompts - 1))
    return float(ndtr(-widening * stdtrit(num_prompts - 1, 0.5 + CONFIDENCE / 2)))


def _widen_near_unanimity(rate: Estimate, num_prompts: int) -> Estimate:
    """Widen a win rate's interval to at least the exact one of P prompts that are all won, or all lost.

    If all images of a prompt win with probability q, this happens for all P prompts with probability q^P. A q with
    q^P < 2.5 % is ruled out, and the expected win rate is at least q. If all prompts win, the bootstrap interval has
    width 0; if nearly all do, it is too narrow as well, and must not be narrower than if all did.
    """
    if rate.low is None or rate.high is None:
        return rate
    limit = ((1 - CONFIDENCE) / 2) ** (1 / num_prompts)
    # The comparison with 1/2: with few prompts limit < 1/2, and a rate of 1/2 needs no widening.
    if rate.value >= limit and rate.value > 1 / 2:
        return Estimate(rate.value, min(rate.low, limit), rate.high)
    if rate.value <= 1 - limit and rate.value < 1 / 2:
        return Estimate(rate.value, rate.low, max(rate.high, 1 - limit))
    return rate
