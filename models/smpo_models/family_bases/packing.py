"""Latents packed into tokens, as FLUX.1's pipeline does (diffusers, ``pipeline_flux.py``).

Shape suffixes: B batch, C h w a latent, P tokens, D numbers of a token.
"""

from __future__ import annotations

import torch

PATCH = 2
"""Side, in latent positions, of one token."""


def packed(x_BChw: torch.Tensor) -> torch.Tensor:
    """Pack each patch of 2 x 2 latent positions into one token, ordered (C, row, column): [B, P, 4C]."""
    batch, channels, height, width = x_BChw.shape
    patches = x_BChw.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH**2)


def unpacked(x_BPD: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Undo :func:`packed`: [B, C, h, w]."""
    batch, _, depth = x_BPD.shape
    patches = x_BPD.reshape(batch, height // PATCH, width // PATCH, depth // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)
