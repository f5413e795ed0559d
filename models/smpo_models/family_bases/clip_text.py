"""CLIP text encoders with a pooled embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def pooled_in_float64(encoder: Any) -> Any:  # noqa: ANN401  (transformers' CLIPTextModelWithProjection)
    """Make the encoder compute its pooled embedding in float64, rounded once.

    In float32, the last bits of a product with so few rows depend on the size of the batch.
    """
    encoder.text_projection.register_forward_hook(_project)
    return encoder


def _project(projection: nn.Linear, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> torch.Tensor:
    return functional.linear(inputs[0].double(), projection.weight.double()).float()
