"""Number types that models compute in."""

from typing import Literal

Dtype = Literal["bf16", "fp16", "fp32"]
"""The values of ``--dtype``."""

Quantization = Literal["nf4", "int8"]
"""Of the frozen weights below an adapter."""
