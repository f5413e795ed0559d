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
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from smpo_trainer.data.order import Order, Window

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
        shards = np.repeat(np.arange(len(states_per_shard)), states_per_shard)
        self._states_HB = np.zeros((len(states_per_shard), int(bucket_S.max()) + 1), dtype=np.int64)
        np.add.at(self._states_HB, (shards, bucket_S), 1)
        self._states_B = self._states_HB.sum(0)
        self._flows = lru_cache(maxsize=4)(self._flow)
        self._groups = lru_cache(maxsize=4)(self._fill)
        # Asked for each state of a group, and for each of its micro-batches.
        self._places = lru_cache(maxsize=4)(self._place)
        self._named = lru_cache(maxsize=4)(self._name)

    def state_at(self, position: int) -> int:
        """See the base class."""
        epoch, index, place = self._places(position // self._group)
        return int(self._groups(epoch, index)[0][place, position % self._group])

    def window_at(self, position: int) -> Window:
        """The window whose states complete the group of a global position.

        Its ``shards`` are also those of earlier windows whose states have waited for one of its groups.
        """
        epoch, index, _ = self._places(position // self._group)
        return self._named(epoch, index)

    def _name(self, epoch: int, index: int) -> Window:
        """See :meth:`window_at`."""
        first, stop = (int(number) * self._group for number in self._finished(epoch)[index : index + 2])
        states = self._groups(epoch, index)[0].ravel()
        own = self._windows(epoch)[0][index].shards
        waited = set(np.searchsorted(self._first_states, np.unique(states), side="right") - 1) - set(own)
        return Window(epoch, index, first, stop, (*own, *(int(shard) for shard in sorted(waited))))

    def positions_to_see_all(self) -> int:
        """See the base class: of a bucket smaller than a group, this takes several epochs."""
        return max(self._seen(int(bucket)) for bucket in np.flatnonzero(self._states_B))

    def _seen(self, bucket: int) -> int:
        """The position after the group in which a bucket's last state comes for the first time."""
        total = int(self._states_B[bucket])
        number = -(-total // self._group) - 1  # of its groups, from 0
        epoch, rank = divmod((number + 1) * self._group - 1, total)
        before_WB = self._flows(epoch) - epoch * self._states_B
        index = int(np.searchsorted(before_WB[:, bucket], rank, side="right")) - 1
        within = number - int(self._flows(epoch)[index, bucket]) // self._group
        place = int(np.flatnonzero(self._groups(epoch, index)[1] == bucket)[within])
        return (int(self._finished(epoch)[index]) + place + 1) * self._group

    def _place(self, number: int) -> tuple[int, int, int]:
        """Epoch and window in which the group of this number is completed, and which of the window's groups it is."""
        epoch = number * self._group // self.num_states  # or a later one, since states wait
        while self._finished(epoch)[-1] <= number:
            epoch += 1
        finished = self._finished(epoch)
        index = int(np.searchsorted(finished, number, side="right")) - 1
        return epoch, index, number - int(finished[index])

    def _flow(self, epoch: int) -> np.ndarray:
        """How many states of each bucket come before each of an epoch's windows, and before the next: [W + 1, B]."""
        windows, _ = self._windows(epoch)
        counts_WB = np.stack([self._states_HB[list(window.shards)].sum(0) for window in windows])
        return epoch * self._states_B + np.concatenate([np.zeros_like(counts_WB[:1]), counts_WB.cumsum(0)])

    def _finished(self, epoch: int) -> np.ndarray:
        """How many groups are complete before each of an epoch's windows, and before the next: [W + 1]."""
        return (self._flows(epoch) // self._group).sum(1)

    def _fill(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups that a window completes: their states, int64 [groups, states of one], and buckets [groups]."""
        states = self._states(self._windows(epoch)[0][index])
        buckets = self._bucket_S[states]
        found: list[tuple[int, int, np.ndarray]] = []
        for bucket in np.unique(buckets).tolist():
            places = np.flatnonzero(buckets == bucket)
            waiting = int(self._flows(epoch)[index, bucket]) % self._group
            if waiting + len(places) < self._group:
                continue
            queue = np.concatenate([self._last_before(epoch, index, bucket, waiting), states[places]])
            stops = range(self._group, len(queue) + 1, self._group)
            found += [(int(places[stop - waiting - 1]), bucket, queue[stop - self._group : stop]) for stop in stops]
        found.sort(key=lambda group: group[0])
        filled = [group for _, _, group in found]
        return (
            np.stack(filled) if filled else np.zeros((0, self._group), dtype=np.int64),
            np.array([bucket for _, bucket, _ in found], dtype=np.int64),
        )

    def _last_before(self, epoch: int, index: int, bucket: int, number: int) -> np.ndarray:
        """The last states of a bucket that come before a window, in their order: int64 [number]."""
        parts: list[np.ndarray] = []
        while number:
            if index == 0:
                epoch -= 1
                index = len(self._windows(epoch)[0])
            index -= 1
            flow_W = self._flows(epoch)[index : index + 2, bucket]
            if flow_W[0] == flow_W[1]:
                continue
            states = self._states(self._windows(epoch)[0][index])
            parts.insert(0, states[self._bucket_S[states] == bucket][-number:])
            number -= len(parts[0])
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def make_order(bucket_S: np.ndarray, states_per_shard: Sequence[int], seed: int, window: int, group: int) -> Order:
    """The order for states of one bucket or of several; arguments as of :class:`BucketedOrder`."""
    if len(np.unique(bucket_S)) == 1:
        return Order(states_per_shard, seed, window)
    return BucketedOrder(bucket_S, states_per_shard, seed, window, group)


def bucket_remark(bucket_S: np.ndarray, group: int) -> str | None:
    """What to tell the user of several buckets."""
    sizes = np.unique(bucket_S, return_counts=True)[1]
    if len(sizes) == 1:
        return None
    rare = sizes[sizes < group]
    waits = (
        f"; of {len(rare)} there are fewer states than that, {rare.sum()} in all, which wait for later epochs"
        if len(rare)
        else ""
    )
    return f"latents of {len(sizes)} shapes, {group} states of one at a time{waits}"
