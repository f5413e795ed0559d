"""Win rate and mean difference of two models' scores, with 95 % intervals.

Images of one prompt resemble each other, so that the sampling unit is the prompt, not the image. Intervals come from a
bootstrap over whole prompts: 10,000 resamples with a fixed seed, and percentiles at the expanded levels of Hesterberg,
"What Teachers Should Know About the Bootstrap" (The American Statistician 69, 2015, section 3.4), since the usual
percentile interval is too narrow with few prompts.

Shape suffixes: P prompts, I images per prompt, V quantities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, stdtrit

RESAMPLES = 10_000
CONFIDENCE = 0.95
_BOOTSTRAP_SEED = 20_250_602
_CHUNK = 4_000_000  # resampling weights in memory at once, which bounds the memory with many prompts
_ROUNDING = 1e-9  # a bound that is 50 % but for the rounding of a sum does not exclude it

Verdict = Literal["better", "worse", "undecided"]


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

    @property
    def verdict(self) -> Verdict:
        """Whether the interval of the win rate lies above or below 50 %; else, or without one, ``undecided``."""
        low, high = self.win_rate.low, self.win_rate.high
        if low is not None and low > 1 / 2 + _ROUNDING:
            return "better"
        return "worse" if high is not None and high < 1 / 2 - _ROUNDING else "undecided"

    def reversed(self) -> Comparison:
        """Return the comparison of the other model against this one."""
        rate, difference = self.win_rate, self.mean_difference
        return Comparison(
            win_rate=_reflected(rate, 1.0),
            mean_difference=_reflected(difference, 0.0),
            wins=self.losses,
            ties=self.ties,
            losses=self.wins,
        )


def _reflected(estimate: Estimate, total: float) -> Estimate:
    """Return the estimate of ``total`` minus the quantity."""
    low, high = estimate.low, estimate.high
    return Estimate(
        total - estimate.value, None if high is None else total - high, None if low is None else total - low
    )


def compare(scores_PI: np.ndarray, baseline_PI: np.ndarray) -> Comparison:
    """Compare a model with the baseline.

    Args:
        scores_PI: the model's scores, finite; image i of prompt p starts from the same noise in both arrays.
        baseline_PI: the baseline's scores.
    """
    return compare_differences([np.asarray(scores_PI, dtype=np.float64) - baseline_PI])[0]


def compare_differences(differences: Sequence[np.ndarray]) -> list[Comparison]:
    """Make several comparisons on the same resamples, which is much faster than one by one.

    Args:
        differences: per comparison, the model's scores minus the other's, [P, I].
    """
    per_prompt = [
        quantity
        for difference_PI in differences
        for quantity in ((np.sign(difference_PI) + 1).mean(axis=1) / 2, difference_PI.mean(axis=1))
    ]
    estimates = clustered_means(np.stack(per_prompt, axis=1))
    return [
        Comparison(
            win_rate=_widen_near_unanimity(win_rate, num_prompts=len(difference_PI)),
            mean_difference=mean_difference,
            wins=int((difference_PI > 0).sum()),
            ties=int((difference_PI == 0).sum()),
            losses=int((difference_PI < 0).sum()),
        )
        for difference_PI, win_rate, mean_difference in zip(differences, estimates[::2], estimates[1::2], strict=True)
    ]


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
