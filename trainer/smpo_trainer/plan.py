"""Which state is trained on when, and where: pure functions of counts and a seed.

A run consumes global positions 0, 1, 2, ... in order. Position n is the (n mod N)-th entry of the seeded permutation
of epoch n // N, so every one of the N states comes exactly once an epoch, whatever the batch size, the number of
processes or the number of loader workers; and the whole of a run's progress is one count of consumed positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
def epoch_order(num_states: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of 0 .. ``num_states`` - 1 in which an epoch goes through the states, int64."""
    return np.random.default_rng([seed, epoch]).permutation(num_states)


def state_at(position: int, num_states: int, seed: int) -> int:
    """The state at a global position."""
    epoch, place = divmod(position, num_states)
    return int(epoch_order(num_states, seed, epoch)[place])


@dataclass(frozen=True)
class Plan:
    """How a run's positions fall to its steps and processes.

    Attributes:
        num_states: N, states that there are to train on.
        seed: of the order.
        batch_size: states that one process takes at once.
        grad_accum: such micro-batches that make one optimizer step.
        world_size: number of processes.
    """

    num_states: int
    seed: int
    batch_size: int
    grad_accum: int
    world_size: int

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
        return [state_at(position, self.num_states, self.seed) for position in positions]

    def micro_batches(self, first_step: int, last_step: int, rank: int) -> Iterator[list[int]]:
        """What a process takes, in order, in the steps from ``first_step`` up to, not including, ``last_step``."""
        for step in range(first_step, last_step):
            for accumulation in range(self.grad_accum):
                yield self.states(self.positions(step, accumulation, rank))
