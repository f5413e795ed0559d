"""Arithmetic of the denoisers: the inverting one is narrow throughout, the reference computes as the trainer does."""

from __future__ import annotations

import copy

import torch
from torch import nn

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def narrow_products(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast, in place, what autocast casts at each use: no bit of a forward under autocast changes.

    Norms keep float32 weights, as they have in training.
    """
    for module in denoiser.modules():
        if isinstance(module, _PRODUCTS):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def narrowed(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with all weights of the given type; it shares with the original those that have it already."""
    shared = {id(parameter): parameter for parameter in denoiser.parameters() if parameter.dtype == dtype}
    # Not the model's own `to`, which warns of layers to keep in float32 even where it names none.
    return nn.Module.to(copy.deepcopy(denoiser, shared), dtype)
