"""Dtypes of a denoiser's weights and inputs.

In training and for the reference, autocast computes products in a narrow type (bf16 or fp16) and the rest in float32.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def narrow_products(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights of products (linear layers, convolutions) to ``dtype``, in place.

    Other frozen weights that are narrow become float32. Trained weights and quantized ones stay as they are. Autocast
    would cast the weights of products at each use, so that no bit of a forward or backward under autocast changes.
    """
    for module in denoiser.modules():
        is_product = isinstance(module, _PRODUCTS)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not tensor.requires_grad and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype if is_product else torch.promote_types(tensor.dtype, torch.float32))


def narrowed(denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy with all weights in ``dtype``; those that have this dtype already are shared with the original."""
    shared = {id(parameter): parameter for parameter in denoiser.parameters() if parameter.dtype == dtype}
    # Not diffusers' own `to`, which warns about layers to keep in float32 even if the model names none.
    return nn.Module.to(copy.deepcopy(denoiser, shared), dtype)


def input_dtype(denoiser: nn.Module, device: torch.device) -> torch.dtype:
    """Return the dtype to give a denoiser its inputs in: float32 under autocast, else the dtype of its weights.

    FLUX.1 rounds times to the dtype of its inputs, which must not depend on :func:`narrow_products`.
    """
    # The meta device, on which operations are counted, has no autocast.
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    # Quantized weights are integers.
    return torch.float32 if casts else next(each.dtype for each in denoiser.parameters() if each.is_floating_point())
