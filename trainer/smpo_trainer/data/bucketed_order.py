"""The order of states where latents have several shapes (``invert --buckets``): groups of one shape.

The states flow as :class:`~smpo_trainer.data.order.Order` lets them, window by window, and each goes to the end of its
bucket's queue. Whenever a queue holds a group, that comes next. So buckets come in proportion to their states, each
bucket's states come once before any of them comes again, and none is ever dropped: what is left in a queue at the end
of a window, or of an epoch, waits there for more of its shape. With one bucket this is the order without buckets.

A group is cut into micro-batches, and an optimizer step holds whole groups. The smaller they are, the fewer states
wait, from the fewer shards, and the more shapes share a step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from smpo_trainer.data.order import Order, Window

# A whole step of one shape would be simpler, but a step of 1024 states of a rare shape needs as many shards.
MAX_GROUP = 64
"""States of a group at most, unless micro-batches ask for more: all processes of most runs together take no more."""


def group_size(states_per_step: int, batch_size: int) -> int:
    """How many states are of one shape at a time.

    It divides a step's states and is a multiple of a micro-batch's. The number of processes, and mostly the size of a
    micro-batch, make no difference, so that a run may go on with others.
    """
    largest = max(size for size in range(1, MAX_GROUP + 1) if states_per_step % size == 0)
    return math.lcm(largest, batch_size)


class BucketedOrder(Order):
    """The endless order of all states, in groups of one bucket."""

    def __init__(
        self, bucket_S: np.ndarray, states_per_shard: Sequence[int], seed: int, window: int, group: int
    ) -> None:
        """Describe an order.

        Args:
            bucket_S: of each state the number of its bucket, from 0.
            states_per_shard: how many states of each shard are trained on; may be 0.
            seed: decides the order.
            window: as in :class:`~smpo_trainer.data.order.Order`.
            group: every so many positions, from position 0 on, hold states of one bucket.
        """
        super().__init__(states_per_shard, seed, window)
        self._bucket_S, self._group = bucket_S, group
        self._states_B = np.bincount(bucket_S)
        # The queues before each epoch that is known.
        self._queues: list[list[list[int]]] = [[[] for _ in self._states_B]]
        # A batch, or the window ahead of it, may reach over the end of an epoch.
        self._epoch = lru_cache(maxsize=3)(self._simulate)

    def state_at(self, position: int) -> int:
        """See the base class."""
        states, windows = self._epoch_of(position)
        return int(states[position - windows[0].first])

    def window_at(self, position: int) -> Window:
        """The window whose states complete the group of a global position.

        Its ``shards`` are also those of earlier windows whose states have waited for one of its groups.
        """
        windows = self._epoch_of(position)[1]
        return windows[bisect_right(windows, position, key=lambda window: window.stop)]

    def positions_to_see_all(self) -> int:
        """See the base class: of a bucket smaller than a group, this takes several epochs."""
        unseen_S, left, position = np.ones(self.num_states, dtype=bool), self.num_states, 0
        while left:
            states, windows = self._epoch_of(position)
            first = position - windows[0].first
            group = np.unique(states[first : first + self._group])
            left -= int(unseen_S[group].sum())
            unseen_S[group] = False
            position += self._group
        return position

    def _finished(self, epoch: int) -> int:
        """How many groups are complete before an epoch."""
        return int((epoch * self._states_B // self._group).sum())

    def _epoch_of(self, position: int) -> tuple[np.ndarray, list[Window]]:
        """What :meth:`_simulate` gives of the epoch in which the group of a global position is completed."""
        epoch = position // self.num_states  # or a later one, since states wait
        while self._finished(epoch + 1) <= position // self._group:
            epoch += 1
        return self._epoch(epoch)

    def _simulate(self, epoch: int) -> tuple[np.ndarray, list[Window]]:
        """The states of the groups that an epoch completes, int64, and its windows with the positions of theirs."""
        while len(self._queues) <= epoch:
            self._simulate(len(self._queues) - 1)
        queues = [queue.copy() for queue in self._queues[epoch]]
        states: list[int] = []
        windows: list[Window] = []
        first = stop = self._finished(epoch) * self._group
        for window in self._windows(epoch)[0]:
            own = self._shuffle(window)
            for state, bucket in zip(own.tolist(), self._bucket_S[own].tolist(), strict=True):
                queues[bucket].append(state)
                if len(queues[bucket]) == self._group:
                    states += queues[bucket]
                    queues[bucket].clear()
            start, stop = stop, first + len(states)
            read = np.unique(np.searchsorted(self._first_states, states[start - first :], side="right") - 1)
            shards = tuple(dict.fromkeys([*window.shards, *read.tolist()]))
            windows.append(replace(window, first=start, stop=stop, shards=shards))
        if len(self._queues) == epoch + 1:
            self._queues.append(queues)
        return np.array(states, dtype=np.int64), windows


def make_order(bucket_S: np.ndarray, states_per_shard: Sequence[int], seed: int, window: int, group: int) -> Order:
    """The order for states of one bucket or of several; arguments as of :class:`BucketedOrder`."""
    if len(np.unique(bucket_S)) == 1:
        return Order(states_per_shard, seed, window)
    return BucketedOrder(bucket_S, states_per_shard, seed, window, group)
