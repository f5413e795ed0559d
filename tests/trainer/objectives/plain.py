"""Plain versions of the objectives, as in the papers: one pair at a time, with a winner, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(winner's error, loser's error, reference errors of both, P(winner preferred)) -> loss, at BETA and defaults."""

BETA, GAMMA, T = 20.0, 10.0, 1000


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def log_ratio(error: torch.Tensor, ref_error: torch.Tensor) -> torch.Tensor:
    """beta log (p_theta / p_ref) of one image, by the bound."""
    return BETA / 2 * (ref_error - error)


def smpo(w, l, rw, rl, p):  # noqa: E741
    alpha = GAMMA * p  # the paper's alpha / gamma is p
    return -torch.log(sigmoid((2 * alpha - GAMMA) * (log_ratio(w, rw) - log_ratio(l, rl))))


def dpo(w, l, rw, rl, _p):  # noqa: E741
    return -torch.log(sigmoid(-BETA / 2 * (w - rw - (l - rl))))


def npo(w, l, rw, rl, p):  # noqa: E741
    return dpo(l, w, rl, rw, p)


def ipo(w, l, rw, rl, _p):  # noqa: E741
    # equation 17, (rho - 1 / (2 tau))^2 with tau = beta, times beta^2
    rho = (log_ratio(w, rw) - log_ratio(l, rl)) / BETA
    return BETA**2 * (rho - 1 / (2 * BETA)) ** 2


def capo(w, l, rw, rl, p):  # noqa: E741
    # rewards whose difference gives p; each image's win rate over the other one
    reward_w, reward_l = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    calibrated_w, calibrated_l = sigmoid(reward_w - reward_l), sigmoid(reward_l - reward_w)
    return (calibrated_w - calibrated_l - (log_ratio(w, rw) - log_ratio(l, rl))) ** 2


def dmpo(w, l, rw, rl, _p, smoothing=0.01):  # noqa: E741
    weights = torch.stack([torch.exp(log_ratio(w, rw)), torch.exp(log_ratio(l, rl))])
    model = weights / weights.sum()
    label = torch.tensor([1 - smoothing, smoothing], dtype=torch.float64)
    return (model * torch.log(model / label)).sum()


def mapo(w, l, _rw, _rl, _p):  # noqa: E741
    score_w = 0.5 * w / (torch.exp(0.5 * w) - 1)
    score_l = 0.5 * l / (torch.exp(0.5 * l) - 1)
    return w - 0.1 * torch.log(sigmoid(T * (score_w - score_l)))


def linear_dpo(w, l, rw, rl, _p):  # noqa: E741
    weight = (0.2 * BETA * ((w - rw) - (l - rl)) + 0.5).clamp(1e-3, 1 - 1e-3).detach()
    return weight * (w - l)


def sft(w, _l, _rw, _rl, _p):
    return w


def selfnpo(w, l, _rw, _rl, _p):  # noqa: E741
    return (w + l) / 2


PLAIN: dict[str, Loss] = {
    "smpo": smpo,
    "dpo": dpo,
    "npo": npo,
    "ipo": ipo,
    "capo": capo,
    "dmpo": dmpo,
    "mapo": mapo,
    "sft": sft,
    "linear-dpo": linear_dpo,
    "selfnpo": selfnpo,
}
