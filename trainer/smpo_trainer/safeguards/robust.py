"""The robust mean of a step's losses (``--robust``): DoRA's, arXiv 2504.05831.

L = lambda log( (1/n) sum_b exp(x_b / lambda) ) over the n states of a step, with x_b the loss times the pair's weight.
Its gradient is sum_b q_b grad x_b, q = softmax(x / lambda): states with a large loss count more. It tends to the mean
for a large lambda, and to the largest x_b for a small one.

Shape suffixes: B a micro-batch of states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from smpo_trainer.loss_settings import RobustForm
from smpo_trainer.monitoring.metrics import Record


class RobustMean:
    """The robust mean of one step, from its micro-batches in all processes.

    q needs all states of the step, which are seen one micro-batch at a time. As in a streaming softmax, each adds
    exp(x_b / lambda - m) grad x_b / n to the gradient, with m the largest x / lambda so far in any process. A larger m
    scales the gradient down that was accumulated before it. :meth:`finish` divides by the mean of the exponentials. So
    the result does not depend on the micro-batches, and no exponent is above 0.
    """

    def __init__(
        self,
        scale: float,
        form: RobustForm,
        num_states: int,
        accelerator: Accelerator,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        """Start a step.

        Args:
            scale: lambda.
            form: ``pair``, as in the module's docstring; ``list``: mean(w) lambda log mean exp(l / lambda), where x is
                the loss l without the weight w.
            num_states: n, over all processes.
            accelerator: this process's accelerator.
            parameters: their gradients are accumulated.
        """
        self._scale, self._form, self._num_states = scale, form, num_states
        self._accelerator, self._parameters = accelerator, parameters
        self._largest = -math.inf
        # Sums over this process's states: of exp(x / lambda - m), of its square, and of the weights.
        self._sums_3 = torch.zeros(3, dtype=torch.float64, device=accelerator.device)

    def add(self, loss_B: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
        """Return the scalar to backpropagate for a micro-batch, in place of the sum of its losses. Collective.

        Args:
            loss_B: losses times weights.
            weight_B: weights of the pairs, above 0.
        """
        x_B = loss_B / weight_B if self._form == "list" else loss_B
        exponent_B = x_B.detach().double() / self._scale
        here = float(self._accelerator.gather(exponent_B.max().reshape(1)).max())
        largest = max(self._largest, here, key=_with_nan_last)
        shrinks = math.exp(self._largest - largest)
        if shrinks != 1:
            self._scale_gradients(shrinks)
            self._sums_3[:2] *= torch.tensor([shrinks, shrinks**2], dtype=torch.float64, device=self._sums_3.device)
        self._largest = largest
        share_B = (exponent_B - largest).exp()
        self._sums_3 += torch.stack([share_B.sum(), share_B.square().sum(), weight_B.double().sum()])
        return (share_B.to(x_B.dtype) * x_B).sum()

    def finish(self) -> Record:
        """Turn the accumulated gradients into those of L; return L and how evenly the states count. Collective."""
        total, squares, weights = self._accelerator.reduce(self._sums_3, "sum").tolist()
        factor = weights / self._num_states if self._form == "list" else 1.0
        self._scale_gradients(factor * self._num_states / total)
        return {
            "robust/loss": factor * self._scale * (self._largest + math.log(total / self._num_states)),
            "robust/largest_share": 1 / total,
            "robust/effective": total**2 / squares,
        }

    def _scale_gradients(self, factor: float) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _with_nan_last(value: float) -> float:
    # A loss that is not a number must reach the gradient, so that the step is skipped.
    return math.inf if math.isnan(value) else value
