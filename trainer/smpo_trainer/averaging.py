"""The moving average of the trained weights (``--ema-decay``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class WeightAverage:
    """Exponential moving average over optimizer steps, in the weights' own dtype.

    After step n the decay is the smaller of ``decay`` and n / (9 + n), so that the start weighs little in short runs
    (diffusers' EMAModel).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._average = EMAModel(parameters, decay=decay)

    def step(self) -> None:
        """Take in the weights after an optimizer step."""
        self._average.step(self._parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the model has the averaged weights."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._average.copy_to(self._parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self._average.load_state_dict(state)
        self._average.to(self._parameters[0].device)
