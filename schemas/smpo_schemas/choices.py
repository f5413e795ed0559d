"""Values that flags of several commands take."""

from typing import Literal

Dtype = Literal["bf16", "fp16", "fp32"]
"""The values of ``--dtype``: what models compute in."""

Quantization = Literal["nf4", "int8"]
"""How the frozen weights below an adapter are stored."""

OptimizerName = Literal["adamw", "adafactor", "adamw8bit"]
"""Optimizers by their names on command lines."""

SamplerChoice = Literal["model", "ddim"]
"""The samplers that images can be made with. ``model``: the model's own scheduler, with its config; ``ddim``: DDIM's
first-order steps, which are Euler's for flow models. Inversion reverses these steps."""
