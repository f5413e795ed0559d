"""The order of states where latents have several shapes (``invert --buckets``): every optimizer step holds one shape.

The states flow as :class:`~smpo_trainer.plan.Order` lets them, window by window, and each goes to the end of its
bucket's queue. Whenever a queue holds a step's states, they are the next step. So buckets come in proportion to their
states, each bucket's states come once before any of them comes again, and none is ever dropped: what is left in a queue
at the end of a window, or of an epoch, waits there for more of its shape. With one bucket this is the order without
buckets.

The order depends on the number of states of a step, but not on how a step is cut into processes and micro-batches; all
processes take the same number of steps, and are at the same shape at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from smpo_trainer.plan import Order, Window


class BucketedOrder(Order):
    """The endless order of all states, in groups of one bucket."""

    def __init__(
        self, bucket_S: np.ndarray, states_per_shard: Sequence[int], seed: int, window: int, states_per_step: int
    ) -> None:
        """Describe an order.

        Args:
            bucket_S: of each state the number of its bucket, from 0.
            states_per_shard: how many states of each shard are trained on; may be 0.
            seed: decides the order.
            window: as in :class:`~smpo_trainer.plan.Order`.
            states_per_step: every so many positions, from position 0 on, hold states of one bucket.
        """
        super().__init__(states_per_shard, seed, window)
        self._bucket_S, self._group = bucket_S, states_per_step
        shards = np.repeat(np.arange(len(states_per_shard)), states_per_shard)
        self._states_HB = np.zeros((len(states_per_shard), int(bucket_S.max()) + 1), dtype=np.int64)
        np.add.at(self._states_HB, (shards, bucket_S), 1)
        self._states_B = self._states_HB.sum(0)
        self._flows = lru_cache(maxsize=4)(self._flow)
        self._steps = lru_cache(maxsize=4)(self._fill)
        # Asked for each state of a step, and for each of its micro-batches.
        self._places = lru_cache(maxsize=4)(self._place)
        self._named = lru_cache(maxsize=4)(self._name)

    def state_at(self, position: int) -> int:
        """See the base class."""
        epoch, index, step = self._places(position // self._group)
        return int(self._steps(epoch, index)[0][step, position % self._group])

    def window_at(self, position: int) -> Window:
        """The window whose states complete the step of a global position.

        Its ``shards`` are also those of earlier windows whose states have waited for one of its steps.
        """
        epoch, index, _ = self._places(position // self._group)
        return self._named(epoch, index)

    def _name(self, epoch: int, index: int) -> Window:
        """See :meth:`window_at`."""
        first, stop = (int(number) * self._group for number in self._finished(epoch)[index : index + 2])
        states = self._steps(epoch, index)[0].ravel()
        own = self._windows(epoch)[0][index].shards
        waited = set(np.searchsorted(self._first_states, np.unique(states), side="right") - 1) - set(own)
        return Window(epoch, index, first, stop, (*own, *(int(shard) for shard in sorted(waited))))

    def positions_to_see_all(self) -> int:
        """See the base class: of a bucket smaller than a step, this takes several epochs."""
        return max(self._seen(int(bucket)) for bucket in np.flatnonzero(self._states_B))

    def _seen(self, bucket: int) -> int:
        """The position after the step in which a bucket's last state comes for the first time."""
        total = int(self._states_B[bucket])
        number = -(-total // self._group) - 1  # of its steps, from 0
        epoch, rank = divmod((number + 1) * self._group - 1, total)
        before_WB = self._flows(epoch) - epoch * self._states_B
        index = int(np.searchsorted(before_WB[:, bucket], rank, side="right")) - 1
        within = number - int(self._flows(epoch)[index, bucket]) // self._group
        step = int(np.flatnonzero(self._steps(epoch, index)[1] == bucket)[within])
        return (int(self._finished(epoch)[index]) + step + 1) * self._group

    def _place(self, number: int) -> tuple[int, int, int]:
        """Epoch and window in which the step of this number is completed, and which of the window's steps it is."""
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
        """How many steps are complete before each of an epoch's windows, and before the next: [W + 1]."""
        return (self._flows(epoch) // self._group).sum(1)

    def _fill(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The steps that a window completes: their states, int64 [steps, states of a step], and buckets [steps]."""
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
        found.sort(key=lambda step: step[0])
        filled = [step for _, _, step in found]
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


def make_order(
    bucket_S: np.ndarray, states_per_shard: Sequence[int], seed: int, window: int, states_per_step: int
) -> Order:
    """The order for states of one bucket or of several; arguments as of :class:`BucketedOrder`."""
    if len(np.unique(bucket_S)) == 1:
        return Order(states_per_shard, seed, window)
    return BucketedOrder(bucket_S, states_per_shard, seed, window, states_per_step)


def bucket_remark(bucket_S: np.ndarray, states_per_step: int) -> str | None:
    """What to tell the user of several buckets."""
    sizes = np.unique(bucket_S, return_counts=True)[1]
    if len(sizes) == 1:
        return None
    rare = sizes[sizes < states_per_step]
    waits = (
        f"; {len(rare)} of them have fewer states than a step ({states_per_step}), {rare.sum()} in all, which wait for "
        "later epochs to fill one"
        if len(rare)
        else ""
    )
    return f"latents of {len(sizes)} shapes, one in each step{waits}"
