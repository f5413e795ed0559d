"""The order of states of several latent shapes, against queues filled one state at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from smpo_trainer.data.bucketed_order import BucketedOrder, group_size, make_order
from smpo_trainer.data.order import Batching, Order
from smpo_trainer.remarks import bucket_remark
from tests.trainer.data.test_order import SHARDS, WORLDS, consumed

# 101 states in four buckets of 60, 30, 8 and 3, in no order.
BUCKETS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [60, 30, 8, 3]))


def bucketed(group: int, window: int = 25, seed: int = 3) -> BucketedOrder:
    return BucketedOrder(BUCKETS, SHARDS, seed, window, group)


def queued(group: int, window: int, seed: int) -> Iterator[int]:
    """Put every state into the queue of its bucket; a full queue is the next group."""
    order = Order(SHARDS, seed, window)
    queues: list[list[int]] = [[], [], [], []]
    position = 0
    while True:
        state = order.state_at(position)
        queue = queues[BUCKETS[state]]
        queue.append(state)
        if len(queue) == group:
            yield from queue
            queue.clear()
        position += 1


@pytest.mark.parametrize("window", [1, 25, 60, 1000])
@pytest.mark.parametrize("group", [1, 2, 7, 16, 150])
def test_the_order_is_that_of_queues(group: int, window: int) -> None:
    wanted = list(islice(queued(group, window, 3), 600))
    order = bucketed(group, window)
    assert [order.state_at(position) for position in range(600)] == wanted
    # The state at a position does not depend on earlier calls.
    for position in (599, 0, 311):
        assert bucketed(group, window).state_at(position) == wanted[position]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_group_has_one_shape_and_every_state_comes_once(world_size: int) -> None:
    """For any number of processes, which share a step of 48 states, or a larger one if they are too many."""
    step = 48 if 48 % world_size == 0 else 3 * world_size
    batch = 1 if step == 48 else 3
    plan = Batching(bucketed(group_size(step, batch)), batch, step // world_size // batch, world_size)
    assert plan.states_per_step == step
    steps = max(4, -(-4 * 101 // step))
    order = consumed(plan, steps)
    for rank in range(world_size):
        for positions in plan.micro_batches(0, steps, rank):
            assert len(set(BUCKETS[plan.states(positions)])) == 1
    for bucket, number in enumerate((60, 30, 8, 3)):
        came = [state for state in order if BUCKETS[state] == bucket]
        for start in range(0, len(came) - number + 1, number):
            assert len(set(came[start : start + number])) == number
    # The others wait: fewer than a group in each bucket.
    counts = np.bincount(order, minlength=101)
    for bucket in range(4):
        assert np.ptp(counts[bucket == BUCKETS]) <= 1


@pytest.mark.parametrize(
    ("step", "batch", "wanted"),
    [(1024, 1, 64), (1024, 8, 64), (1024, 128, 128), (1024, 1024, 1024), (96, 1, 48), (96, 32, 96), (16, 4, 16),
     (1009, 1, 1), (1009, 1009, 1009), (1, 1, 1)],
)  # fmt: skip
def test_groups_divide_a_step_and_hold_whole_micro_batches(step: int, batch: int, wanted: int) -> None:
    assert group_size(step, batch) == wanted
    assert step % wanted == wanted % batch == 0


def test_fewer_states_than_a_group_wait_in_each_bucket() -> None:
    for group in (2, 7, 16):
        order = bucketed(group)
        for epoch in range(1, 6):
            done = order._groups_before(epoch) * group
            counts = np.bincount([BUCKETS[order.state_at(p)] for p in range(done)], minlength=4)
            waiting = epoch * np.array([60, 30, 8, 3]) - counts
            assert (waiting >= 0).all()
            assert (waiting < group).all()


def test_order_depends_on_the_effective_batch_alone() -> None:
    def of(*cut: int) -> list[int]:
        return consumed(Batching(bucketed(24), *cut), 9)

    wanted = of(24, 1, 1)
    for cut in ((1, 24, 1), (1, 1, 24), (3, 4, 2), (2, 3, 4)):
        assert of(*cut) == wanted


@pytest.mark.parametrize("world_size", WORLDS[:8])
def test_resuming_gives_the_same_order_element_by_element(world_size: int) -> None:
    def taken(first: int, rank: int) -> list[list[int]]:
        plan = Batching(bucketed(2 * 3 * world_size), batch_size=2, grad_accum=3, world_size=world_size)
        return [plan.states(positions) for positions in plan.micro_batches(first, 6, rank)]

    for rank in range(world_size):
        whole = taken(0, rank)
        for first in range(6):
            assert taken(first, rank) == whole[first * 3 :]


@pytest.mark.parametrize("window", [1, 10, 25, 1000])
@pytest.mark.parametrize("group", [2, 7, 40])
def test_windows_follow_each_other_and_name_the_shards_of_their_states(group: int, window: int) -> None:
    order = bucketed(group, window)
    position = 0
    while position < 300:
        here = order.window_at(position)
        assert here.first == position < here.stop
        assert order.window_at(here.stop - 1) == here
        assert {order.shard_of(order.state_at(p)) for p in range(here.first, here.stop)} <= set(here.shards)
        assert len(set(here.shards)) == len(here.shards)
        position = here.stop


@pytest.mark.parametrize("group", [1, 2, 7, 16, 60])
def test_positions_to_see_all(group: int) -> None:
    order = bucketed(group)
    seen: set[int] = set()
    position = 0
    while len(seen) < 101:
        seen |= {order.state_at(position + offset) for offset in range(group)}
        position += group
    assert order.positions_to_see_all() == position
    assert Order(SHARDS, 3, 25).positions_to_see_all() == 101


def test_one_bucket_is_the_order_without_buckets() -> None:
    plain, one = Order(SHARDS, 3, 25), BucketedOrder(np.zeros(101, dtype=np.int64), SHARDS, 3, 25, 7)
    assert [one.state_at(p) for p in range(300)] == [plain.state_at(p) for p in range(300)]
    assert type(make_order(np.full(101, 2), SHARDS, 3, 25, 7)) is Order
    assert type(make_order(BUCKETS, SHARDS, 3, 25, 7)) is BucketedOrder


def test_rare_shapes_are_mentioned() -> None:
    assert bucket_remark(np.ones(5), 16) is None
    assert bucket_remark(BUCKETS, 3) == "latents of 4 shapes, in groups of 3 states of the same shape"
    assert "groups of 16 states of the same shape; rarer shapes: 2 (11 states)" in bucket_remark(BUCKETS, 16)
