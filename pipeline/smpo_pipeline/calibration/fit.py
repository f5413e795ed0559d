"""Fit the mixture's temperatures and weights to labels, by maximum likelihood.

The loss is the mean cross-entropy of the labels (a tie counts half for either image, a share as its votes) with
p = sum_k w_k sigmoid(m_k / tau_k), minimised over log tau and the logits of w by L-BFGS in float64, which is
deterministic. A wide normal prior on both (standard deviation 3, less than one label's weight in all) keeps the optimum
finite where the labels alone would give a tau of 0 (a reward that is never wrong) or infinity (an uninformative one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

_PRIOR_STD = 3.0
_MAX_ITERATIONS = 200
_HEAD_START = 2.0
"""Logit of one reward above the others in the starts besides the even one: the loss may have several minima."""


@dataclass(frozen=True)
class MixtureFit:
    """Float64 [K] tau_K in units of the margins and weight_K that sum to 1; ``loss`` is the mean cross-entropy."""

    tau_K: np.ndarray
    weight_K: np.ndarray
    loss: float


def fit_mixture(
    margins_PK: np.ndarray, labels_P: np.ndarray, votes_P: np.ndarray | None = None, *, equal_weights: bool = False
) -> MixtureFit:
    """Fit the mixture to labels.

    Args:
        margins_PK: score of image_0 minus score of image_1; no column may be all 0.
        labels_P: P(image_0 preferred), without NaN.
        votes_P: number of votes behind each label; None: 1 each.
        equal_weights: keep all weights the same.
    """
    # Divide by the margins' size, so that a score's unit does not affect the fit.
    size_K = np.sqrt(np.average(np.square(margins_PK, dtype=np.float64), axis=0, weights=votes_P))
    unit_PK = torch.from_numpy(margins_PK / size_K)
    labels = torch.from_numpy(np.asarray(labels_P, dtype=np.float64))
    votes = torch.ones_like(labels) if votes_P is None else torch.from_numpy(np.asarray(votes_P, dtype=np.float64))
    count = margins_PK.shape[1]

    def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:count], torch.zeros(count, dtype=torch.float64) if equal_weights else x[count:]

    def cross_entropy(x: torch.Tensor) -> torch.Tensor:
        log_tau, logits = split(x)
        scaled_PK = unit_PK * torch.exp(-log_tau)
        log_weight = torch.log_softmax(logits, dim=0)
        log_p = torch.logsumexp(log_weight + torch.nn.functional.logsigmoid(scaled_PK), dim=1)
        log_not_p = torch.logsumexp(log_weight + torch.nn.functional.logsigmoid(-scaled_PK), dim=1)
        return -(votes * (labels * log_p + (1 - labels) * log_not_p)).sum() / votes.sum()

    def penalised(x: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x) + x.square().sum() / (2 * _PRIOR_STD**2 * votes.sum())

    even = torch.zeros(count if equal_weights else 2 * count, dtype=torch.float64)
    starts = [even]
    if not equal_weights and count > 1:
        for leader in range(count):
            start = even.clone()
            start[count + leader] = _HEAD_START
            starts.append(start)
    best = min((_minimise(penalised, start) for start in starts), key=lambda x: penalised(x).item())
    log_tau, logits = split(best)
    return MixtureFit(
        tau_K=torch.exp(log_tau).numpy() * size_K,
        weight_K=torch.softmax(logits, dim=0).numpy(),
        loss=cross_entropy(best).item(),
    )


def fit_temperature(margins_P: np.ndarray, labels_P: np.ndarray, votes_P: np.ndarray | None = None) -> float:
    """Fit the temperature tau of sigmoid(margin / tau), in units of the margin."""
    return float(fit_mixture(margins_P[:, None], labels_P, votes_P, equal_weights=True).tau_K[0])


def _minimise(loss: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=_MAX_ITERATIONS, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(evaluate)
    if not math.isfinite(loss(x).item()):
        raise ArithmeticError(f"the fit from {start.tolist()} diverged")
    return x.detach()
