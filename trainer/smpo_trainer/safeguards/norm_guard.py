"""A hinge on the growth of the model's outputs (``--norm-guard``): NormGuard, arXiv 2606.27771.

Preference training makes the velocities of flow models 5 to 15 % longer than the reference's, and images worse. The
hinge is only active above the reference's norm. Norms are root mean squares over C, h, w, which differ from the paper's
by a constant; the weight of the published term was not found.

Shape suffixes: B states, 2 images.
"""

from __future__ import annotations

import torch


def norm_excess(norm_B2: torch.Tensor, ref_norm_B2: torch.Tensor) -> torch.Tensor:
    """Compute max(0, |v| - |v_ref|), mean of both images, [B].

    Args:
        norm_B2: root mean squares of the policy's outputs.
        ref_norm_B2: those of the reference at the same states.
    """
    return (norm_B2 - ref_norm_B2).clamp(min=0).mean(dim=1)


def norm_growth(norm_B2: torch.Tensor, ref_norm_B2: torch.Tensor) -> torch.Tensor:
    """Compute |v| / |v_ref| - 1, mean of both images, [B]."""
    return (norm_B2.detach() / ref_norm_B2 - 1).mean(dim=1)
