from __future__ import annotations

import pytest

from smpo_trainer.plan import Plan, epoch_order, state_at

WORLDS = (1, 2, 3, 4, 5, 7, 8, 16, 64)


def consumed(plan: Plan, steps: int) -> list[int]:
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


@pytest.mark.parametrize("world_size", WORLDS)
def test_every_state_once_an_epoch(world_size: int) -> None:
    plan = Plan(num_states=101, seed=3, batch_size=3, grad_accum=2, world_size=world_size)
    steps = -(-3 * 101 // plan.states_per_step)
    order = consumed(plan, steps)
    for epoch in range(3):
        assert sorted(order[epoch * 101 : (epoch + 1) * 101]) == list(range(101))
    assert order[:101] != order[101:202]


def test_order_depends_on_the_effective_batch_alone() -> None:
    wanted = consumed(Plan(50, 1, 24, 1, 1), 5)
    for batch_size, grad_accum, world_size in ((1, 24, 1), (1, 1, 24), (3, 4, 2), (2, 3, 4), (24, 1, 1)):
        assert consumed(Plan(50, 1, batch_size, grad_accum, world_size), 5) == wanted


@pytest.mark.parametrize("world_size", WORLDS)
def test_resuming_gives_the_same_order_element_by_element(world_size: int) -> None:
    plan = Plan(num_states=29, seed=0, batch_size=2, grad_accum=3, world_size=world_size)
    for rank in range(world_size):
        whole = list(plan.micro_batches(0, 6, rank))
        for first in range(6):
            assert list(plan.micro_batches(first, 6, rank)) == whole[first * 3 :]


def test_seed_decides_the_order() -> None:
    assert epoch_order(20, 0, 0).tolist() == epoch_order(20, 0, 0).tolist()
    assert epoch_order(20, 0, 0).tolist() != epoch_order(20, 1, 0).tolist()
    assert state_at(23, 20, 0) == epoch_order(20, 0, 1)[3]
