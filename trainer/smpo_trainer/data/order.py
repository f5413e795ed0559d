"""The order of states over steps and processes: pure functions of counts and a seed.

A run consumes global positions 0, 1, 2, ... in order. Each epoch shuffles the shards and splits them into windows of at
least ``window`` states; the states of a window are shuffled together. So every state comes exactly once per epoch,
whatever the batch size and the number of processes or workers; a run needs the shards of one window at a time; and its
progress is a single count of positions, which makes resuming bit-exact. For latents of several shapes see
:mod:`smpo_trainer.data.bucketed_order`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_STATES, _SHARDS = 0, 1
"""Random streams: the order of states in a window, and the order of shards in an epoch."""


@dataclass(frozen=True)
class Window:
    """Shards whose states are shuffled together.

    Attributes:
        epoch, index: number of the epoch, and of the window in it.
        first: global position of the first state.
        stop: global position after the last state.
        shards: the shards, in the order of the epoch.
    """

    epoch: int
    index: int
    first: int
    stop: int
    shards: tuple[int, ...]


class Order:
    """The endless order of all states, which are numbered shard by shard.

    Attributes:
        num_states: N, states per epoch.
    """

    def __init__(self, states_per_shard: Sequence[int], seed: int, window: int) -> None:
        """Describe an order.

        Args:
            states_per_shard: number of states in each shard that are trained on; may be 0.
            seed: seed of the order.
            window: minimum number of states shuffled together; the last window of an epoch may have fewer.
        """
        # Windows: one permutation over everything would touch every shard in each batch, so no cache could be bounded.
        self._seed, self._window = seed, window
        # The first state of each shard, and N at the end.
        self._first_states = np.concatenate([[0], np.cumsum(states_per_shard, dtype=np.int64)])
        self.num_states = int(self._first_states[-1])
        # A batch may cross the end of a window or epoch.
        self._windows = lru_cache(maxsize=2)(self._split)
        self._states = lru_cache(maxsize=2)(self._shuffle)

    def state_at(self, position: int) -> int:
        """Return the state at a global position."""
        window = self.window_at(position)
        return int(self._states(window)[position - window.first])

    def window_at(self, position: int) -> Window:
        """Return the window of a global position."""
        windows, stops = self._windows(position // self.num_states)
        return windows[int(np.searchsorted(stops, position, side="right"))]

    def positions_to_see_all(self) -> int:
        """Return the number of positions after which every state has come at least once."""
        return self.num_states

    def shard_of(self, state: int) -> int:
        """Return the shard of a state."""
        return int(np.searchsorted(self._first_states, state, side="right")) - 1

    def _split(self, epoch: int) -> tuple[list[Window], np.ndarray]:
        """Return the windows of an epoch, and their ``stop`` positions."""
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
                    break  # the remaining shards have no states
        return windows, np.array([window.stop for window in windows])

    def _shuffle(self, window: Window) -> np.ndarray:
        """Return the shuffled states of a window, int64."""
        # Sorted, so that the result depends on the set of shards only; seeded by epoch and window, so that a resumed
        # run finds it without the windows before.
        ranges = [np.arange(*self._first_states[shard : shard + 2]) for shard in sorted(window.shards)]
        stream = np.random.default_rng([self._seed, window.epoch, window.index, _STATES])
        return stream.permutation(np.concatenate(ranges))


@dataclass(frozen=True)
class Batching:
    """The distribution of positions over steps, micro-batches and processes.

    Attributes:
        order: order of the states.
        batch_size: states of a micro-batch, per process.
        grad_accum: micro-batches of an optimizer step.
        world_size: number of processes.
    """

    order: Order
    batch_size: int
    grad_accum: int
    world_size: int

    @property
    def num_states(self) -> int:
        """States per epoch."""
        return self.order.num_states

    @property
    def states_per_step(self) -> int:
        """States per optimizer step, over all processes."""
        return self.batch_size * self.grad_accum * self.world_size

    def positions(self, step: int, accumulation: int, rank: int) -> range:
        """Return the global positions of a micro-batch.

        Args:
            step: optimizer step, from 0.
            accumulation: micro-batch within the step, from 0.
            rank: process, from 0.
        """
        first = ((step * self.grad_accum + accumulation) * self.world_size + rank) * self.batch_size
        return range(first, first + self.batch_size)

    def states(self, positions: Iterable[int]) -> list[int]:
        """Return the states at global positions."""
        return [self.order.state_at(position) for position in positions]

    def micro_batches(self, first_step: int, last_step: int, rank: int) -> Iterator[range]:
        """Yield the positions of a process's micro-batches in the steps ``first_step`` to ``last_step`` (excluded)."""
        for step in range(first_step, last_step):
            for accumulation in range(self.grad_accum):
                yield self.positions(step, accumulation, rank)
