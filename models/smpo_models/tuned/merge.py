"""Merge denoisers that were tuned from one base, for example into the negative model of Diffusion-NPO."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from smpo_models.tuned.negative import require_same_weights


@torch.no_grad()
def merge_into(base: nn.Module, tuned: Mapping[str, tuple[nn.Module, float]]) -> None:
    """Add weighted differences to the base: theta + sum of w (theta_tuned - theta) (arXiv 2505.11245).

    Computed in float64 as a weighted sum, so that a weight of 1 alone gives that model to the bit.

    Args:
        base: float32; is changed in place.
        tuned: float32 denoisers of the base's architecture, each with its factor w, by their names in errors.

    Raises:
        UserError: the denoisers differ in their architecture.
    """
    for name, (module, _) in tuned.items():
        require_same_weights(base, module, name, "the base")
    others = [(module.state_dict(), weight) for module, weight in tuned.values()]
    left = 1 - sum(weight for _, weight in others)
    for name, theta in base.state_dict().items():
        if theta.is_floating_point():
            theta.copy_(left * theta.double() + sum(weight * state[name].double() for state, weight in others))
