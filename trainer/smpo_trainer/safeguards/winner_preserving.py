"""Winner-preserving updates (``--winner-preserving``): Diffusion-SDPO, arXiv 2511.03317.

A preference loss lowers the error of the preferred image w and raises that of the other one, l. A step along
-(g_w - c g_l) changes e_w by -(|g_w|^2 - c g_w.g_l) to first order, so that a common direction of both gradients can
raise e_w. The factor c of the other image's gradient is limited such that e_w falls by at least the share mu of what
its own gradient alone would do: c <= (1 - mu) |g_w|^2 / g_w.g_l where g_w.g_l > 0. As published, gradients are taken
with respect to the outputs (2 r / N, with r = output - target), as if the weights changed both outputs alike.

The published code takes the products over a micro-batch, of 1 pair in its scripts; here each state has its own factor.

Shape suffixes: B states, 2 images.
"""

from __future__ import annotations

import torch

from smpo_trainer.objectives.base import select_preferred


def loser_scale(error_B2: torch.Tensor, cross_B: torch.Tensor, preferred_B: torch.Tensor, mu: float) -> torch.Tensor:
    """Compute c = min(1, (1 - mu) e_w / <r_w, r_l>), [B]; 1 where the product is not positive or no image preferred.

    Args:
        error_B2: e, mean squares of r.
        cross_B: <r_w, r_l>, the mean product of both images' r.
        preferred_B: positive where image_0 is preferred, negative where image_1 is.
        mu: the share, from 0 to 1.
    """
    winner_B = select_preferred(error_B2.detach(), preferred_B)
    limits_B = (cross_B > 0) & (preferred_B != 0)
    limit_B = (1 - mu) * winner_B / cross_B.where(limits_B, 1)
    return limit_B.clamp(max=1).where(limits_B, 1)


def preserve_winner(error_B2: torch.Tensor, scale_B: torch.Tensor, preferred_B: torch.Tensor) -> torch.Tensor:
    """Return the same errors, [B, 2], but multiply the gradient of the image that is not preferred by ``scale_B``."""
    loses_B2 = torch.stack([preferred_B < 0, preferred_B > 0], dim=1)
    fixed_B2 = error_B2.detach()
    return fixed_B2 + scale_B[:, None].where(loses_B2, 1) * (error_B2 - fixed_B2)
