"""Arithmetic of denoisers: which of their weights and inputs are narrow.

In training and for the reference, autocast computes products in a narrow type and the rest in float32.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def narrow_products(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast, in place, those frozen weights that autocast casts at each use; others that are narrow become float32.

    No bit of a forward or backward under autocast changes: norms have float32 weights, and what is trained does.
    Quantized weights stay as they are.
    """
    for module in denoiser.modules():
        is_product = isinstance(module, _PRODUCTS)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not tensor.requires_grad and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype if is_product else torch.promote_types(tensor.dtype, torch.float32))


def narrowed(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with all weights of the given type; it shares with the original those that have it already."""
    shared = {id(parameter): parameter for parameter in denoiser.parameters() if parameter.dtype == dtype}
    # Not the model's own `to`, which warns of layers to keep in float32 even where it names none.
    return nn.Module.to(copy.deepcopy(denoiser, shared), dtype)


def input_dtype(denoiser: nn.Module, device: torch.device) -> torch.dtype:
    """Return the type of a denoiser's inputs: that of its weights; under autocast, which casts them itself, float32.

    FLUX.1 rounds times to the type of its inputs, which must not depend on :func:`narrow_products`.
    """
    # The meta device, on which operations are counted, knows no autocast.
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    # Quantized weights are integers.
    return torch.float32 if casts else next(each.dtype for each in denoiser.parameters() if each.is_floating_point())
