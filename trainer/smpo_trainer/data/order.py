"""Which state is trained on when, and where: pure functions of counts and a seed.

A run consumes global positions 0, 1, 2, ... in order. In each epoch the shards are put in a seeded order and cut into
windows of at least ``window`` states; within a window all states are shuffled together. So every state comes exactly
once an epoch, whatever the batch size, the number of processes or of loader workers; a run needs the shards of one
window at a time; and the whole of its progress is one count of consumed positions. Where latents have several
shapes, see :mod:`smpo_trainer.data.bucketed_order`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_STATES, _SHARDS = 0, 1
"""Streams of random numbers: of a window's order of states, and of an epoch's order of shards."""


@dataclass(frozen=True)
class Window:
    """Shards whose states are shuffled together.

    Attributes:
        epoch, index: which pass over the data, and which window of it.
        first: global position of its first state.
        stop: global position after its last.
        shards: in the order in which they are read.
    """

    epoch: int
    index: int
    first: int
    stop: int
    shards: tuple[int, ...]


class Order:
    """The endless order of all states; the states are numbered shard after shard.

    Attributes:
        num_states: N, states of one epoch.
    """

    def __init__(self, states_per_shard: Sequence[int], seed: int, window: int) -> None:
        """Describe an order.

        Args:
            states_per_shard: how many states of each shard are trained on; may be 0.
            seed: decides the order.
            window: the fewest states that are shuffled together; an epoch's last window may have fewer.
        """
        # Windows: one permutation over everything would touch every shard in each batch, so no cache could be bounded.
        self._seed, self._window = seed, window
        # The first state of each shard, and after the last shard N.
        self._first_states = np.concatenate([[0], np.cumsum(states_per_shard, dtype=np.int64)])
        self.num_states = int(self._first_states[-1])
        # A batch may reach over the end of a window, or of an epoch.
        self._windows = lru_cache(maxsize=2)(self._cut)
        self._states = lru_cache(maxsize=2)(self._shuffle)

    def state_at(self, position: int) -> int:
        """The state at a global position."""
        window = self.window_at(position)
        return int(self._states(window)[position - window.first])

    def window_at(self, position: int) -> Window:
        """The window that a global position falls into."""
        windows, stops = self._windows(position // self.num_states)
        return windows[int(np.searchsorted(stops, position, side="right"))]

    def positions_to_see_all(self) -> int:
        """The position before which every state has come at least once."""
        return self.num_states

    def shard_of(self, state: int) -> int:
        """The shard that a state lies in."""
        return int(np.searchsorted(self._first_states, state, side="right")) - 1

    def _cut(self, epoch: int) -> tuple[list[Window], np.ndarray]:
        """An epoch's windows, and the positions after the last state of each."""
        windows: list[Window] = []
        shards: list[int] = []
        first = stop = epoch * self.num_states
        order = np.random.default_rng([self._seed, epoch, 0, _SHARDS]).permutation(len(self._first_states) - 1)
        for shard in order.tolist():
            stop += int(self._first_states[shard + 1] - self._first_states[shard])
            shards.append(shard)
            if stop - first >= self._window or stop == (epoch + 1) * self.num_states:
                windows.append(Window(epoch, len(windows), first, stop, tuple(shards)))
                shards, first = [], stop
                if stop == (epoch + 1) * self.num_states:
                    break  # what is left are shards without states
        return windows, np.array([window.stop for window in windows])

    def _shuffle(self, window: Window) -> np.ndarray:
        """The states of a window in their order, int64."""
        ranges = [np.arange(*self._first_states[shard : shard + 2]) for shard in sorted(window.shards)]
        stream = np.random.default_rng([self._seed, window.epoch, window.index, _STATES])
        return stream.permutation(np.concatenate(ranges))


@dataclass(frozen=True)
class Batching:
    """How a run's positions fall to its steps and processes.

    Attributes:
        order: of the states.
        batch_size: states that one process takes at once.
        grad_accum: such micro-batches that make one optimizer step.
        world_size: number of processes.
    """

    order: Order
    batch_size: int
    grad_accum: int
    world_size: int

    @property
    def num_states(self) -> int:
        """States of one epoch."""
        return self.order.num_states

    @property
    def states_per_step(self) -> int:
        """States of one optimizer step, over all processes."""
        return self.batch_size * self.grad_accum * self.world_size

    def positions(self, step: int, accumulation: int, rank: int) -> range:
        """The global positions of one micro-batch.

        Args:
            step: optimizer step, from 0.
            accumulation: micro-batch of the step, from 0.
            rank: process, from 0.
        """
        first = ((step * self.grad_accum + accumulation) * self.world_size + rank) * self.batch_size
        return range(first, first + self.batch_size)

    def states(self, positions: Iterable[int]) -> list[int]:
        """The states at global positions."""
        return [self.order.state_at(position) for position in positions]

    def micro_batches(self, first_step: int, last_step: int, rank: int) -> Iterator[range]:
        """The positions that a process takes, in order, in the steps ``first_step`` to ``last_step`` (excluded)."""
        for step in range(first_step, last_step):
            for accumulation in range(self.grad_accum):
                yield self.positions(step, accumulation, rank)
