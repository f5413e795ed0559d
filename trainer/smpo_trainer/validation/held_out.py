"""Held-out pairs, to measure generalisation (``--val-fraction``).

The split depends on the prompt only: no image of a held-out prompt is trained on, and every run over the same data
holds out the same prompts, whatever its seed or objective.

Shape suffixes: P trajectories, S states, B a batch, 2 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from accelerate import Accelerator

from smpo_common.errors import UserError
from smpo_trainer.data.loader import StateBatch, StateDataset, collate, require_batch
from smpo_trainer.data.state_table import StateTable
from smpo_trainer.model.denoising_error import reference_errors
from smpo_trainer.model.policy import Policy
from smpo_trainer.shards.fetch import ShardStore
from smpo_trainer.shards.shard_set import ShardSet

_NUM_STRETCHES = 32
"""Number of stretches of trajectories in a sample: with more, it covers the table better, but reads more shards."""


def split_by_prompt(table: StateTable, fraction: float) -> tuple[StateTable, StateTable]:
    """Split the states into those that are trained on and those that are held out.

    Args:
        table: all states.
        fraction: approximate fraction of the prompts to hold out.

    Raises:
        UserError: one of the two is empty.
    """
    held_S = table.prompt_draw_P[table.trajectory_S] < fraction
    if not held_S.any() or held_S.all():
        raise UserError(
            f"--val-fraction {fraction} holds out {'all' if held_S.any() else 'none'} of the prompts, which are too "
            "few; change it, or give more --shards"
        )
    return table.only(~held_S), table.only(held_S)


def sample_evenly(table: StateTable, number: int) -> np.ndarray:
    """Sample ``number`` states from as many trajectories as possible: increasing indices, int64.

    In round k every trajectory with more than k states gives its k-th one, in a fixed random order. If the last round
    is needed only in part, it gives evenly spaced stretches of trajectories, to cover all directories with few shards.
    """
    keys_S = np.random.default_rng(0).random(len(table))
    order = np.lexsort([keys_S, table.trajectory_S])  # by trajectory, at random within one
    first_of_trajectory = np.flatnonzero(np.diff(table.trajectory_S[order], prepend=-1))
    rounds = np.arange(len(table)) - np.repeat(first_of_trajectory, np.diff(first_of_trajectory, append=len(table)))
    by_round = order[np.argsort(rounds, kind="stable")]
    number = min(number, len(table))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(rounds))])  # round k is bounds[k] to bounds[k + 1] of by_round
    last = np.searchsorted(bounds, number) - 1
    before, size = bounds[last], bounds[last + 1] - bounds[last]
    of_last = before + _stretches(size, number - before)
    return np.sort(np.concatenate([by_round[:before], by_round[of_last]]))


def _stretches(size: int, number: int) -> np.ndarray:
    """Choose ``number`` increasing indices below ``size``: stretches of equal length with equal gaps around them."""
    count = min(number, _NUM_STRETCHES)
    stretch = np.arange(number) * count // number
    return np.arange(number) + (2 * stretch + 1) * (size - number) // (2 * count)


class HeldOut:
    """This process's share of the held-out states, in memory.

    Attributes:
        batches: batches on the CPU.
        num_forwards: largest number of batches of any process.
        num_states: number of states over all processes.
    """

    def __init__(
        self,
        shards: ShardSet,
        table: StateTable,
        chosen: Sequence[int],
        store: ShardStore,
        batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        """Read the ``chosen`` states of ``table``; ``store`` fetches their shards.

        Raises:
            UserError: there are fewer states than processes, or a shard or sample is missing or damaged.
        """
        world, rank = accelerator.num_processes, accelerator.process_index
        if len(chosen) < world:
            raise UserError(f"{len(chosen)} held-out states are too few for {world} processes; raise --val-fraction")
        shares = np.array_split(np.asarray(chosen), world)
        own = shares[rank].tolist()
        store.wait_for(np.unique(table.locations.shard_P[table.trajectory_S[own]]).tolist())
        dataset = StateDataset(shards, table)
        self.batches: list[StateBatch] = [
            require_batch(collate([dataset[state] for state in states])) for states in _batches(own, table, batch_size)
        ]
        self.num_forwards = max(len(_batches(share.tolist(), table, batch_size)) for share in shares)
        self.num_states = len(chosen)
        self._accelerator = accelerator

    def recompute_reference(self, policy: Policy) -> None:
        """Recompute the reference errors in this run's precision, before training changes the policy.

        Args:
            policy: its ``reference``, or its untrained ``denoiser``, is the reference.
        """
        for number, batch in enumerate(self.batches):
            error_B2 = reference_errors(policy, batch.to(self._accelerator.device), self._accelerator)
            self.batches[number] = replace(batch, ref_error_B2=error_B2.cpu())


def _batches(states: Sequence[int], table: StateTable, batch_size: int) -> list[list[int]]:
    """Split states into batches of one latent shape each."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for state in states:
        by_shape.setdefault(table.latent_of(state), []).append(state)
    groups = by_shape.values()
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
