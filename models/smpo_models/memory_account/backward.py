"""The memory that autograd holds between forward and backward, and at the peak of the backward pass.

Nothing is computed: a forward on fake tensors records which storages autograd saves, and the graph that it leaves says
in which order they are freed. The engine runs nodes by their sequence number, the highest first, so that every tensor
lives over an interval of these numbers, and the peak is the largest sum of overlapping intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from smpo_models.memory_account.gradients import Intervals, add_gradients, next_number


@dataclass
class _Storages:
    """Distinct storages, each with the first node that saved it, which is the last to run."""

    first: dict[int, int] = field(default_factory=dict)
    size: dict[int, int] = field(default_factory=dict)
    alive: list[torch.UntypedStorage] = field(default_factory=list)

    def add(self, tensor: torch.Tensor, node: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001  (its address; there is no public identity)
        if key not in self.first:
            self.alive.append(storage)  # otherwise a new storage might get the same address
            self.first[key], self.size[key] = node, storage.nbytes()
        self.first[key] = min(self.first[key], node)


@dataclass
class _Block:
    """A checkpointed block: what its recomputed forward saves, and the last of its nodes."""

    saved: _Storages
    last: int


class SavedForBackward:
    """Records a forward: what autograd saves, with and without gradient checkpointing.

    Args:
        denoiser: its parameters and buffers are not counted.
        recomputes: whether its blocks are checkpointed, as by diffusers' ``enable_gradient_checkpointing``.
    """

    def __init__(self, denoiser: nn.Module, *, recomputes: bool) -> None:
        self._weights = {
            tensor.untyped_storage()._cdata  # noqa: SLF001
            for tensors in (denoiser.parameters(), denoiser.buffers())
            for tensor in tensors
        }
        self._saved, self._blocks = _Storages(), list[_Block]()
        if recomputes:
            denoiser.enable_gradient_checkpointing(self._checkpoint)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the forward that runs in this context."""
        with self._hooks(self._saved):
            yield

    @property
    def num_bytes(self) -> int:
        """Bytes held at the end of the forward."""
        return sum(size for key, size in self._saved.size.items() if key not in self._weights)

    def backward_peak(self, loss: torch.Tensor, *, accumulates: bool) -> int:
        """Return the peak bytes of a backward pass: saved tensors, gradients of activations and of parameters.

        Args:
            loss: the end of the graph.
            accumulates: whether gradients of an earlier micro-batch are in memory already.
        """
        intervals = Intervals()
        top = next_number()
        for key, first in self._saved.first.items():
            if key not in self._weights:
                intervals.add(first, top, self._saved.size[key])
        for block in self._blocks:
            for key, first in block.saved.first.items():
                if key not in self._weights and key not in self._saved.first:
                    intervals.add(first, block.last, block.saved.size[key])
        add_gradients(intervals, loss, accumulates=accumulates)
        return intervals.peak()

    def _checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401  (torch's signature)
        """Stand for ``torch.utils.checkpoint``: keep the inputs, and note what the block would save."""
        first = next_number()
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                self._saved.add(tensor, first)
        saved = _Storages()
        with self._hooks(saved):
            output = function(*args)
        self._blocks.append(_Block(saved, next_number() - 1))
        return output

    @staticmethod
    @contextmanager
    def _hooks(saved: _Storages) -> Iterator[None]:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            # The node that saves the tensor is the one made last.
            saved.add(tensor, next_number() - 1)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
