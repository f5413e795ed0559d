"""States with their tensors: read, collated and brought along in the order of the plan.

Shape suffixes: B batch, 2 images, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch.utils.data import DataLoader, Dataset

from smpo_common.errors import UserError
from smpo_schemas.shards.stored_state import read_state
from smpo_trainer.data.order import Batching, Window
from smpo_trainer.data.state_table import StateTable, trajectory_digest
from smpo_trainer.interrupts import leave_signals_to_the_trainer
from smpo_trainer.shards.fetch import ShardStore
from smpo_trainer.shards.shard_set import ShardSet


@dataclass(frozen=True)
class State:
    """One state; the tensors as they are stored."""

    pair_id: str
    prompt: str
    size: tuple[tuple[int, int], tuple[int, int]]
    crop: tuple[tuple[int, int], tuple[int, int]]
    x0_2Chw: torch.Tensor
    noise_2Chw: torch.Tensor
    ref_error_2: torch.Tensor
    timestep: int
    preference: float
    label: float
    weight: float


@dataclass(frozen=True)
class StateBatch:
    """B states.

    Attributes:
        pair_ids, prompts: of each state; the prompt is "" where it was dropped in the inversion.
        sizes, crops: of both images of each state, in pixels.
        x0_B2Chw, noise_B2Chw: float16 or bfloat16, as they are stored.
        ref_error_B2: float32.
        timestep_B: int64.
        preference_B, label_B: float32, NaN where there is none.
        weight_B: float32, the pair's own weight in the loss.
    """

    pair_ids: list[str]
    prompts: list[str]
    sizes: list[tuple[tuple[int, int], tuple[int, int]]]
    crops: list[tuple[tuple[int, int], tuple[int, int]]]
    x0_B2Chw: torch.Tensor
    noise_B2Chw: torch.Tensor
    ref_error_B2: torch.Tensor
    timestep_B: torch.Tensor
    preference_B: torch.Tensor
    label_B: torch.Tensor
    weight_B: torch.Tensor

    def to(self, device: torch.device) -> StateBatch:
        """The same with all tensors on ``device``."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class StateDataset(Dataset[State | UserError]):
    """The states of a table by their number.

    What is wrong with a state, or is known of it before it is read, is returned, not raised: an exception in a loader
    process would come out of it with that process's traceback in its message.

    Attributes:
        ref_error_S2: float32 [S, 2] to give instead of the stored reference errors; None: those.
    """

    def __init__(self, shards: ShardSet, table: StateTable) -> None:
        self._directories = [source.directory for source, _ in shards.places]
        self._table = table
        self.ref_error_S2: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int | UserError) -> State | UserError:
        if isinstance(index, UserError):
            return index
        try:
            return self._read(index)
        except UserError as error:
            return error

    def _read(self, index: int) -> State:
        table = self._table
        trajectory, k = int(table.trajectory_S[index]), int(table.k_S[index])
        directory, location = self._directories[table.locations.shard_P[trajectory]], table.locations[trajectory]
        state = read_state(directory, location, k)
        meta = state.trajectory.meta
        if trajectory_digest(state.trajectory) != table.locations.digest_P[trajectory]:
            raise UserError(
                f"{directory.path / directory.manifest.shards[location.shard].name}: sample {location.key} is not what "
                f"the index says: it is of pair {meta.pair_id}, with the timesteps "
                f"{list(state.trajectory.timesteps)} and "
                f"latents of {state.trajectory.latent}, the scores {meta.scores} and the label {meta.label}"
            )
        return State(
            pair_id=meta.pair_id,
            prompt="" if meta.prompt_dropped else meta.prompt,
            size=meta.size,
            crop=meta.crop,
            x0_2Chw=state.x0_2Chw,
            noise_2Chw=state.noise_2Chw,
            ref_error_2=state.ref_error_2 if self.ref_error_S2 is None else self.ref_error_S2[index].clone(),
            timestep=state.trajectory.timesteps[k],
            preference=float(table.preference_P[trajectory]),
            label=float(table.label_P[trajectory]),
            weight=float(table.weight_P[trajectory]),
        )


def collate(read: Sequence[State | UserError]) -> StateBatch | UserError:
    """Stack states into a batch, in order; the first error, if there is one."""
    states: list[State] = []
    for state in read:
        if isinstance(state, UserError):
            return state
        states.append(state)
    return StateBatch(
        pair_ids=[state.pair_id for state in states],
        prompts=[state.prompt for state in states],
        sizes=[state.size for state in states],
        crops=[state.crop for state in states],
        x0_B2Chw=torch.stack([state.x0_2Chw for state in states]),
        noise_B2Chw=torch.stack([state.noise_2Chw for state in states]),
        ref_error_B2=torch.stack([state.ref_error_2 for state in states]),
        timestep_B=torch.tensor([state.timestep for state in states], dtype=torch.int64),
        preference_B=torch.tensor([state.preference for state in states], dtype=torch.float32),
        label_B=torch.tensor([state.label for state in states], dtype=torch.float32),
        weight_B=torch.tensor([state.weight for state in states], dtype=torch.float32),
    )


def require_batch(batch: StateBatch | UserError) -> StateBatch:
    """Raise what :func:`collate` returned in place of a batch.

    Raises:
        UserError: a state of the batch is missing or damaged.
    """
    if isinstance(batch, UserError):
        raise batch
    return batch


class Feed:
    """A process's batches, in exactly the order of the plan, from shards that are here and found whole."""

    def __init__(self, dataset: StateDataset, plan: Batching, store: ShardStore, rank: int, workers: int) -> None:
        """Serve process ``rank``.

        Args:
            dataset: what is read.
            plan: in which order.
            store: brings the shards.
            rank: process.
            workers: processes that read ahead; 0: this one reads, when it is asked.
        """
        self.dataset, self.plan = dataset, plan
        self._store, self._rank, self._workers = store, rank, workers

    def batches(self, first_step: int, last_step: int) -> Iterator[StateBatch]:
        """The micro-batches of the steps ``first_step`` to ``last_step`` (excluded).

        Raises:
            UserError: a shard or a sample is missing or damaged.
        """
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._brought(first_step, last_step),
            num_workers=self._workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_trainer if self._workers else None,
        )
        for batch in loader:
            yield require_batch(batch)

    def _brought(self, first_step: int, last_step: int) -> Iterator[Sequence[int | UserError]]:
        """The states of each micro-batch, given out when their shards are here; what is wrong with one of these.

        One window of shards is fetched ahead of the one in use, and the one before is kept for batches under way.
        """
        order, end = self.plan.order, last_step * self.plan.states_per_step
        kept: list[Window] = []
        for positions in self.plan.micro_batches(first_step, last_step, self._rank):
            window = order.window_at(positions[-1])
            if not kept or kept[-1].first != window.first:
                first = window.first if kept else positions[0]
                ahead = [order.window_at(window.stop)] if window.stop < end else []
                kept = [*kept[-1:], window]
                self._store.release(shard for each in (*kept, *ahead) for shard in each.shards)
                for each in (window, *ahead):
                    self._store.expect(self._needed(each, max(each.first, first), end))
            states = self.plan.states(positions)
            try:
                self._store.require(sorted({order.shard_of(state) for state in states}))
            except UserError as error:
                yield [error]  # raised when this batch is due: steps before it are made, though it is read ahead
            else:
                yield states

    def _needed(self, window: Window, first: int, end: int) -> set[int]:
        """The shards of a window that this process reads between two global positions."""
        if first == window.first and window.stop <= end:
            return set(window.shards)
        # Where a run goes on or ends within a window: not those whose states are all behind or beyond it.
        order, plan = self.plan.order, self.plan
        positions = range(first, min(window.stop, end))
        own = (place for place in positions if place // plan.batch_size % plan.world_size == self._rank)
        return {order.shard_of(order.state_at(place)) for place in own}
