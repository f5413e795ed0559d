"""The samplers that images can be made with."""

from typing import Literal

SamplerChoice = Literal["model", "ddim"]
"""``model``: the model's own scheduler, with its config; ``ddim``: DDIM's first-order steps, which are Euler's for flow
models. Inversion undoes those."""
