"""The order of states if latents have several shapes (``invert --buckets``): groups of the same shape.

States arrive in the order of :class:`~smpo_trainer.data.order.Order` and enter the queue of their bucket. When a queue
holds a full group, the group comes next. So buckets come in proportion to their states, every state of a bucket comes
once before any comes again, and none is dropped: states left in a queue at the end of a window or epoch wait for more
of their shape. With one bucket this is the order without buckets.

A group is split into micro-batches, and an optimizer step holds complete groups. With smaller groups fewer states wait,
from fewer shards, and more shapes share a step.
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
"""Largest group, unless a micro-batch is larger."""


def group_size(states_per_step: int, batch_size: int) -> int:
    """Return the number of states of the same shape in a row.

    It divides the states of a step and is a multiple of the micro-batch. It does not depend on the number of processes,
    and rarely on the size of a micro-batch, so that a run can be resumed with others.
    """
    largest = max(size for size in range(1, MAX_GROUP + 1) if states_per_step % size == 0)
    return math.lcm(largest, batch_size)


class BucketedOrder(Order):
    """The endless order of all states, in groups of the same bucket."""

    def __init__(
        self, bucket_S: np.ndarray, states_per_shard: Sequence[int], seed: int, window: int, group: int
    ) -> None:
        """Describe an order.

        Args:
            bucket_S: number of each state's bucket, from 0.
            states_per_shard: number of states in each shard that are trained on; may be 0.
            seed: seed of the order.
            window: as in :class:`~smpo_trainer.data.order.Order`.
            group: size of a group; position 0 starts the first one.
        """
        super().__init__(states_per_shard, seed, window)
        self._bucket_S, self._group = bucket_S, group
        self._states_B = np.bincount(bucket_S)
        # The queues at the start of each epoch simulated so far.
        self._queues: list[list[list[int]]] = [[[] for _ in self._states_B]]
        # A batch or the window ahead of it may cross the end of an epoch.
        self._epoch = lru_cache(maxsize=3)(self._simulate)

    def state_at(self, position: int) -> int:
        """See the base class."""
        states, windows = self._epoch_of(position)
        return int(states[position - windows[0].first])

    def window_at(self, position: int) -> Window:
        """Return the window whose states complete the group at a global position.

        Its ``shards`` include those of earlier windows whose states have waited for one of its groups.
        """
        windows = self._epoch_of(position)[1]
        return windows[bisect_right(windows, position, key=lambda window: window.stop)]

    def positions_to_see_all(self) -> int:
        """See the base class; a bucket smaller than a group takes several epochs."""
        unseen_S, num_unseen, position = np.ones(self.num_states, dtype=bool), self.num_states, 0
        while num_unseen:
            states, windows = self._epoch_of(position)
            first = position - windows[0].first
            group = np.unique(states[first : first + self._group])
            num_unseen -= int(unseen_S[group].sum())
            unseen_S[group] = False
            position += self._group
        return position

    def _groups_before(self, epoch: int) -> int:
        """Return how many groups are complete before an epoch."""
        return int((epoch * self._states_B // self._group).sum())

    def _epoch_of(self, position: int) -> tuple[np.ndarray, list[Window]]:
        """Return the result of :meth:`_simulate` for the epoch that completes the group at a global position."""
        # Waiting states delay positions: it is this epoch or a later one.
        epoch = position // self.num_states
        while self._groups_before(epoch + 1) <= position // self._group:
            epoch += 1
        return self._epoch(epoch)

    def _simulate(self, epoch: int) -> tuple[np.ndarray, list[Window]]:
        """Return the states of the groups that an epoch completes, int64, and its windows with their positions."""
        while len(self._queues) <= epoch:
            self._simulate(len(self._queues) - 1)
        # Copies, so that any epoch can be simulated again from the queues at its start.
        queues = [queue.copy() for queue in self._queues[epoch]]
        states: list[int] = []
        windows: list[Window] = []
        first = stop = self._groups_before(epoch) * self._group
        for window in self._windows(epoch)[0]:
            shuffled = self._shuffle(window)
            for state, bucket in zip(shuffled.tolist(), self._bucket_S[shuffled].tolist(), strict=True):
                queues[bucket].append(state)
                if len(queues[bucket]) == self._group:
                    states += queues[bucket]
                    queues[bucket].clear()
            start, stop = stop, first + len(states)
            needed = np.unique(np.searchsorted(self._first_states, states[start - first :], side="right") - 1)
            shards = tuple(dict.fromkeys([*window.shards, *needed.tolist()]))
            windows.append(replace(window, first=start, stop=stop, shards=shards))
        if len(self._queues) == epoch + 1:
            self._queues.append(queues)
        return np.array(states, dtype=np.int64), windows


def make_order(bucket_S: np.ndarray, states_per_shard: Sequence[int], seed: int, window: int, group: int) -> Order:
    """Make the order for one or several buckets; arguments as in :class:`BucketedOrder`."""
    if len(np.unique(bucket_S)) == 1:
        return Order(states_per_shard, seed, window)
    return BucketedOrder(bucket_S, states_per_shard, seed, window, group)
