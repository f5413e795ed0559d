"""Weights quantized as by bitsandbytes: their bytes, and stand-in layers that save the same tensors for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smpo_schemas.choices import Quantization

_BLOCK = 64
"""Weights that share one float32 scale in nf4."""

_TABLE = 4 * 16
"""Bytes of a table that each nf4 layer has: the 16 values that its weights can take, in float32."""


def quantized_bytes(layer: nn.Linear, quantization: Quantization) -> int:
    """Return the bytes of a layer's weight, without its bias."""
    count = layer.in_features * layer.out_features
    if quantization == "int8":
        return count + 4 * layer.out_features
    return -(-count // 2) + 4 * -(-count // _BLOCK) + _TABLE


class QuantizedLinear(nn.Linear):
    """Stands for a frozen quantized layer: its weight is dequantized for each product, forward and backward.

    Attributes:
        quantization: of its weight.
        dtype: of its products and its output.
    """

    quantization: Quantization
    dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (the base class's name)
        """See the base class; 8-bit products save their input for the backward pass."""
        return _Product.apply(input.to(self.dtype), self.in_features, self.out_features, self.quantization == "int8")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, width_in: int, width_out: int, keeps_input: bool) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(*([x] if keeps_input else []))
        ctx.shape = (width_out, width_in)
        return x @ x.new_empty(width_in, width_out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        (grad,) = grads
        return grad @ grad.new_empty(ctx.shape), None, None, None


def quantize(denoiser: nn.Module, quantization: Quantization, dtype: torch.dtype) -> int:
    """Replace all linear layers by stand-ins, in place, except those that the denoiser's class keeps in float32.

    Args:
        denoiser: on the meta device, frozen, without an adapter.
        quantization: of the weights.
        dtype: of products and biases.

    Returns:
        The bytes of the largest dequantized weight, which exists during a product.
    """
    kept = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    largest = 0
    for name, layer in denoiser.named_modules():
        if type(layer) is not nn.Linear or kept & set(name.split(".")):
            continue
        largest = max(largest, layer.weight.numel() * dtype.itemsize)
        size = quantized_bytes(layer, quantization)
        layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(dtype)
        layer.__class__ = QuantizedLinear
        layer.quantization, layer.dtype = quantization, dtype
    return largest
