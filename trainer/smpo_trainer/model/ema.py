"""Exponential moving average of the trained weights (``--ema-decay``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from smpo_trainer.model.fsdp import shard_like


class WeightAverage:
    """Exponential moving average over optimizer steps, in the weights' own dtype.

    It starts with the weights after the first step. At step n > 1 the decay is min(``decay``, n / (9 + n)), so that the
    initial weights count little in short runs (diffusers' EMAModel).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._average = EMAModel(parameters, decay=decay)

    def step(self) -> None:
        """Update the average after an optimizer step."""
        self._average.step(self._parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has the averaged weights."""
        self._average.store(self._parameters)
        self._average.copy_to(self._parameters)
        try:
            yield
        finally:
            self._average.restore(self._parameters)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The averaged weights, in the parameters' order."""
        return list(self._average.shadow_params)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, except ``tensors``."""
        return {name: value for name, value in self._average.state_dict().items() if name != "shadow_params"}

    def load_state_dict(self, state: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Restore the state of a checkpoint."""
        self._average.load_state_dict(state)
        for average, tensor, parameter in zip(self.tensors, tensors, self._parameters, strict=True):
            average.copy_(shard_like(tensor, parameter))
