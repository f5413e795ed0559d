from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from smpo_trainer.data.loader import Feed, State
from smpo_trainer.data.order import Batching, Order
from tests.tiny.stable_diffusion import LATENT_SHAPE

WORLDS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 128, 1000)
SHARDS = (13, 0, 7, 21, 1, 30, 9, 20)  # 101 states


def consumed(plan: Batching, steps: int) -> list[int]:
    """All states of the first steps, in the order of their global positions."""
    places = sorted(
        (position, state)
        for rank in range(plan.world_size)
        for step in range(steps)
        for a in range(plan.grad_accum)
        for position, state in zip(
            plan.positions(step, a, rank), plan.states(plan.positions(step, a, rank)), strict=True
        )
    )
    assert [position for position, _ in places] == list(range(steps * plan.states_per_step))
    return [state for _, state in places]


@pytest.mark.parametrize("window", [1, 25, 1000])
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_state_comes_once_per_epoch(world_size: int, window: int) -> None:
    plan = Batching(Order(SHARDS, 3, window), batch_size=3, grad_accum=2, world_size=world_size)
    steps = -(-3 * 101 // plan.states_per_step)
    order = consumed(plan, steps)
    for epoch in range(3):
        assert sorted(order[epoch * 101 : (epoch + 1) * 101]) == list(range(101))
    assert order[:101] != order[101:202]


def test_order_depends_on_the_effective_batch_alone() -> None:
    def of(*cut: int) -> list[int]:
        return consumed(Batching(Order((20, 30), 1, 20), *cut), 5)

    wanted = of(24, 1, 1)
    for cut in ((1, 24, 1), (1, 1, 24), (3, 4, 2), (2, 3, 4)):
        assert of(*cut) == wanted


@pytest.mark.parametrize("world_size", WORLDS[:8])
def test_resuming_gives_the_same_order_element_by_element(world_size: int) -> None:
    def taken(first: int, rank: int) -> list[list[int]]:
        plan = Batching(Order((9, 9, 11), 0, 10), batch_size=2, grad_accum=3, world_size=world_size)
        return [plan.states(positions) for positions in plan.micro_batches(first, 6, rank)]

    for rank in range(world_size):
        whole = taken(0, rank)
        for first in range(6):
            assert taken(first, rank) == whole[first * 3 :]


@pytest.mark.parametrize("window", [1, 10, 25, 60, 1000])
def test_windows_hold_whole_shards_and_their_states_only(window: int) -> None:
    order = Order(SHARDS, 5, window)
    position = 0
    while position < 2 * 101:
        here = order.window_at(position)
        assert here.first == position
        assert here.stop - here.first == sum(SHARDS[shard] for shard in here.shards)
        assert here.stop - here.first >= window or here.stop % 101 == 0
        # No larger than necessary: without its last shard it would be too small.
        assert here.stop - here.first - SHARDS[here.shards[-1]] < window
        assert {order.shard_of(order.state_at(p)) for p in range(here.first, here.stop)} == {
            shard for shard in here.shards if SHARDS[shard]
        }
        position = here.stop


def test_a_window_is_mixed() -> None:
    order = Order((1000, 1000, 1000), 0, 3000)
    shards = np.array([order.shard_of(order.state_at(p)) for p in range(300)])
    assert np.bincount(shards).min() > 60


def test_a_resumed_run_needs_no_shard_of_a_finished_window() -> None:
    order = Order(SHARDS, 5, 25)
    position = 60
    remaining = {order.shard_of(order.state_at(p)) for p in range(position, 101)}
    done = {shard for p in range(101) if (w := order.window_at(p)).stop <= position for shard in w.shards}
    assert done
    assert not remaining & done


class Reads:
    """Replaces a dataset and a shard store, and records the shards that are used and fetched."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.used: set[int] = set()
        self.fetched: set[int] = set()

    def __getitem__(self, state: int) -> State:
        self.used.add(self._order.shard_of(state))
        latent = torch.zeros(2, *LATENT_SHAPE)
        return State("", "", ((8, 8),) * 2, ((0, 0),) * 2, latent, latent, torch.zeros(2), 0, 1.0, 1.0, 1.0)

    def files_of(self, shards: Iterable[int]) -> set[int]:
        return set(shards)

    def prefetch(self, shards: Iterable[int]) -> None:
        self.fetched |= set(shards)

    def wait_for(self, shards: Iterable[int]) -> None:
        self.prefetch(shards)

    def release(self, in_use: Iterable[int]) -> None:
        pass


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 25, 1000])
def test_resuming_at_any_position_reads_no_shard_that_is_not_needed(world_size: int, window: int) -> None:
    """At most one more with several processes. Windows may contain shards without states."""
    order = Order(SHARDS, 5, window)
    plan = Batching(order, batch_size=2, grad_accum=1, world_size=world_size)
    last = 120 // plan.states_per_step
    for first in range(last):
        for rank in range(world_size):
            reads = Reads(order)
            for _ in Feed(reads, plan, reads, rank, workers=0).batches(first, last):
                pass
            assert reads.used <= reads.fetched
            more = {shard for shard in reads.fetched - reads.used if SHARDS[shard]}
            assert not more or world_size > 1
            assert len(more) <= 1


def test_a_set_within_one_window_is_permuted_as_a_whole() -> None:
    order = Order(SHARDS, 7, 65536)
    for epoch in range(2):
        wanted = np.random.default_rng([7, epoch]).permutation(101)
        assert [order.state_at(epoch * 101 + place) for place in range(101)] == wanted.tolist()


def test_seed_decides_the_order() -> None:
    def of(seed: int) -> list[int]:
        order = Order((10, 10), seed, 5)
        return [order.state_at(p) for p in range(40)]

    assert of(0) == of(0)
    assert of(0) != of(1)
