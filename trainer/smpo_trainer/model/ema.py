"""The moving average of the trained weights (``--ema-decay``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from smpo_trainer.model.fsdp import like


class WeightAverage:
    """Exponential moving average over optimizer steps, in the weights' own dtype.

    It begins with the weights after the first step; at step n > 1 the decay is the smaller of ``decay`` and
    n / (9 + n), so that the start weighs little in short runs (diffusers' EMAModel).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._average = EMAModel(parameters, decay=decay)

    def step(self) -> None:
        """Take in the weights after an optimizer step."""
        self._average.step(self._parameters)

    def apply(self) -> None:
        """Give the model the averaged weights."""
        self._average.copy_to(self._parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for a while."""
        self._average.store(self._parameters)
        self.apply()
        try:
            yield
        finally:
            self._average.restore(self._parameters)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The averaged weights, in the parameters' order."""
        return list(self._average.shadow_params)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: all but ``tensors``."""
        return {name: value for name, value in self._average.state_dict().items() if name != "shadow_params"}

    def load_state_dict(self, state: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Go back to a checkpoint."""
        self._average.load_state_dict(state)
        for average, tensor, parameter in zip(self.tensors, tensors, self._parameters, strict=True):
            average.copy_(like(tensor, parameter))
