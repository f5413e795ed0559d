"""Gradient guidance (TailorPO-G, arXiv 2502.01667): x+ = x - eta_t grad (r_high - r(x))^2, r_high = r(x) + delta.

That is x + 2 eta_t delta grad r(x). It replaces x where its reward is higher. The published delta, 0.5, is for rewards
on the scale of CLIP's logits. A cosine is multiplied by 100 to be on that scale, which is our own reading.
"""

from __future__ import annotations

import math

import torch

from smpo_common.errors import UserError
from smpo_pipeline.rewards import Reward, reward_classes

_DELTA = 0.5
_LOGIT_SCALE = 100


def step_sizes(t_B: torch.Tensor, num_train_timesteps: int, delta: float, unit: str) -> torch.Tensor:
    """Return the factor of the raw reward's gradient, float64 [B]: 2 eta_t delta, times the square of the scale.

    eta_t is a cosine from 0.1 at the last timestep to 0.2 at the first; the paper's text gives the range and the
    direction, the form is our own.

    Args:
        t_B: timesteps.
        num_train_timesteps: T.
        delta: in the raw reward's unit.
        unit: of the raw reward.
    """
    eta_B = 0.1 + 0.05 * (1 + (math.pi * t_B.double() / num_train_timesteps).cos())
    return 2 * eta_B * delta * _scale(unit) ** 2


def gradient_delta(kind: type[Reward], given: float | None) -> float:
    """Return delta in the raw reward's unit: the given one, or the published one.

    Raises:
        UserError: the reward has no gradient.
    """
    if not kind.has_gradient():
        known = ", ".join(sorted(name for name, each in reward_classes().items() if each.has_gradient()))
        raise UserError(f"--gradient-guidance: the reward {kind.name} gives no gradient; those that do: {known}")
    return given or _DELTA / _scale(kind.unit)


def _scale(unit: str) -> float:
    return _LOGIT_SCALE if unit == "cosine" else 1
