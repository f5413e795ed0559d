"""CLIP text encoders with a pooled embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def pooled_in_float64(encoder: Any) -> Any:  # noqa: ANN401  (transformers' CLIPTextModelWithProjection)
    """Have the encoder compute its pooled embedding in float64, rounded once.

    Float32 products of so few rows have other last bits in other batches.
    """
    encoder.text_projection.register_forward_hook(_project)
    return encoder


def _project(projection: nn.Linear, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> torch.Tensor:
    return functional.linear(inputs[0].double(), projection.weight.double()).float()
