"""The gradients of a backward pass: how large each is, and between which nodes it is in memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.autograd.graph import Node

_START = 0
"""Below every sequence number: the end of the interval of what is never freed."""

_PASSING = (
    "AddBackward",
    "AliasBackward",
    "CloneBackward",
    "PermuteBackward",
    "ReshapeAliasBackward",
    "SqueezeBackward",
    "TBackward",
    "TransposeBackward",
    "UnsafeViewBackward",
    "UnsqueezeBackward",
    "ViewBackward",
)
"""Nodes that pass on the gradient that they are given, or a view of it."""

_REDUCING = ("MulBackward", "DivBackward")
"""Nodes that make the gradient of a broadcast factor at full size before they sum it."""

_Edge = tuple[Node, int]
"""A node, and the index of the output that the gradient belongs to."""


class Intervals:
    """Sizes over intervals of sequence numbers, both ends included."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = defaultdict(int)

    def add(self, first: int, last: int, size: int) -> None:
        """Add ``size`` bytes that are in memory while the nodes from ``last`` down to ``first`` run."""
        self._steps[first] += size
        self._steps[last + 1] -= size

    def peak(self) -> int:
        """Return the largest sum at one number."""
        return max(accumulate(self._steps[number] for number in sorted(self._steps)), default=0)


def next_number() -> int:
    """Return the sequence number of the next node that autograd will make."""
    return torch._C._autograd._get_sequence_nr()  # noqa: SLF001  (the profiler's; there is no public one)


def add_gradients(intervals: Intervals, loss: torch.Tensor, *, accumulates: bool) -> None:
    """Add the gradients of a backward pass from ``loss``.

    Args:
        intervals: that the gradients are added to.
        loss: the end of the graph.
        accumulates: whether gradients of an earlier micro-batch are in memory already.
    """
    buffers = _Buffers(intervals)
    for edge, makers in sorted(_edges(loss).items(), key=lambda item: -_number(item[0][0])):
        parameter = getattr(edge[0], "variable", None)
        if parameter is None:
            buffers.add(edge, makers)
            continue
        made, size = max(map(_number, makers)), parameter.untyped_storage().nbytes()
        if accumulates:
            intervals.add(made, made, size)
        intervals.add(_START, next_number() if accumulates else made, size)
    buffers.close()


def _edges(loss: torch.Tensor) -> dict[_Edge, list[Node]]:
    """Return all gradients of the graph, with the nodes that make them."""
    edges: dict[_Edge, list[Node]] = defaultdict(list)
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        for taker, output in node.next_functions if node else ():
            if taker is None:
                continue
            edges[taker, output].append(node)
            if taker not in seen:
                seen.add(taker)
                waiting.append(taker)
    return edges


class _Buffers:
    """The gradients of activations. A node that passes its gradient on has one buffer for input and output.

    A buffer is in memory from the first node to run that writes it, which has the highest number, to the last that
    reads it.
    """

    def __init__(self, intervals: Intervals) -> None:
        self._intervals = intervals
        self._buffer: dict[_Edge, _Edge] = {}
        self._span: dict[_Edge, tuple[int, int]] = {}

    def add(self, edge: _Edge, makers: Sequence[Node]) -> None:
        """Add a gradient; those of nodes with higher numbers must have been added before."""
        size, made, taken = _bytes(edge), max(map(_number, makers)), _number(edge[0])
        buffer = edge
        given = self._buffer.get((makers[0], 0))
        if given and len(makers) == 1 and makers[0].name().startswith(_PASSING) and _bytes(given) == size:
            buffer = given
        self._buffer[edge] = buffer
        first, last = self._span.get(buffer, (taken, made))
        self._span[buffer] = min(first, taken), last
        for maker in makers:
            number = _number(maker)
            if number != made:  # a further gradient of the same output, which is added to the first
                self._intervals.add(number, number, size)
            if maker.name().startswith(_REDUCING) and _bytes((maker, 0)) > size:
                self._intervals.add(number, number, _bytes((maker, 0)))

    def close(self) -> None:
        """Add all buffers to the intervals."""
        for buffer, span in self._span.items():
            self._intervals.add(*span, _bytes(buffer))


def _number(node: Node) -> int:
    return node._sequence_nr()  # noqa: SLF001


def _bytes(edge: _Edge) -> int:
    node, output = edge
    given = node._input_metadata[output]  # noqa: SLF001
    return math.prod(map(int, given.shape)) * given.dtype.itemsize
