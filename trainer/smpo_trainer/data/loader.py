"""Load states with their tensors, in the order of training.

Shape suffixes: B batch, 2 images, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch.utils.data import DataLoader, Dataset

from smpo_common.errors import UserError
from smpo_schemas.shards.stored_state import read_state
from smpo_trainer.data.order import Batching, Window
from smpo_trainer.data.state_table import StateTable, trajectory_digest
from smpo_trainer.runtime.interrupts import ignore_signals_in_worker
from smpo_trainer.shards.fetch import ShardStore
from smpo_trainer.shards.shard_set import ShardSet


@dataclass(frozen=True)
class State:
    """One state, with tensors in their stored dtype. Fields are those of :class:`StateBatch`, for a single state."""

    pair_id: str
    prompt: str
    size: tuple[tuple[int, int], tuple[int, int]]
    crop: tuple[tuple[int, int], tuple[int, int]]
    x0_2Chw: torch.Tensor
    noise_2Chw: torch.Tensor
    ref_error_2: torch.Tensor
    timestep: float
    preference: float
    label: float
    weight: float
    ref_norm_2: torch.Tensor | None = None


@dataclass(frozen=True)
class StateBatch:
    """B states.

    Attributes:
        pair_ids, prompts: of each state; the prompt is "" if it was dropped in the inversion.
        sizes, crops: of both images of each state, in pixels.
        x0_B2Chw, noise_B2Chw: in their stored dtype, float16 or bfloat16.
        ref_error_B2: errors of the reference, float32.
        timestep_B: int64 (float32 for flow-matching models).
        preference_B, label_B: P(image_0 preferred) from rewards and from the annotator, float32; NaN if missing.
        weight_B: weight of the pair in the loss, float32.
        ref_norm_B2: root mean squares of the reference's outputs, float32; None if a directory of the set has none.
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
    ref_norm_B2: torch.Tensor | None = None

    def to(self, device: torch.device) -> StateBatch:
        """Copy all tensors to ``device``."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class StateDataset(Dataset[State | UserError]):
    """The states of a table, by number.

    Errors are returned, not raised: an exception in a loader process would arrive with its traceback in the message. An
    index that is an error already is passed through.

    Attributes:
        ref_error_S2: recomputed reference errors, float32 [S, 2]; None for the stored ones.
    """

    def __init__(self, shards: ShardSet, table: StateTable) -> None:
        self._directories = [source.directory for source, _ in shards.places]
        # Of all states or of none: every process must have the same metrics.
        self._has_ref_norm = all(directory.manifest.has_ref_norm for directory in shards.directories)
        self._table = table
        self.ref_error_S2: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._table)

    def files_of(self, shards: Iterable[int]) -> set[int]:
        """See :meth:`StateTable.files_of`."""
        return self._table.files_of(shards)

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
        # Both files match the manifest, but may contradict each other: the index decided preference and weight.
        if trajectory_digest(state.trajectory) != table.locations.digest_P[trajectory]:
            raise UserError(
                f"{directory.path / directory.manifest.shards[location.shard].name}: sample {location.key} differs "
                f"from the index: it holds pair {meta.pair_id} with timesteps {list(state.trajectory.timesteps)}, "
                f"latents of shape {state.trajectory.latent}, scores {meta.scores} and label {meta.label}"
            )
        return State(
            pair_id=meta.pair_id,
            prompt=meta.used_prompt,
            size=meta.size,
            crop=meta.crop,
            x0_2Chw=state.x0_2Chw,
            noise_2Chw=state.noise_2Chw,
            ref_error_2=state.ref_error_2 if self.ref_error_S2 is None else self.ref_error_S2[index].clone(),
            timestep=state.trajectory.timesteps[k],
            preference=float(table.preference_P[trajectory]),
            label=float(table.label_P[trajectory]),
            weight=float(table.weight_P[trajectory]),
            ref_norm_2=state.ref_norm_2 if self._has_ref_norm else None,
        )


def collate(items: Sequence[State | UserError]) -> StateBatch | UserError:
    """Stack states into a batch, in order; or return the first error."""
    states: list[State] = []
    for item in items:
        if isinstance(item, UserError):
            return item
        states.append(item)
    norms = [state.ref_norm_2 for state in states if state.ref_norm_2 is not None]
    return StateBatch(
        pair_ids=[state.pair_id for state in states],
        prompts=[state.prompt for state in states],
        sizes=[state.size for state in states],
        crops=[state.crop for state in states],
        x0_B2Chw=torch.stack([state.x0_2Chw for state in states]),
        noise_B2Chw=torch.stack([state.noise_2Chw for state in states]),
        ref_error_B2=torch.stack([state.ref_error_2 for state in states]),
        timestep_B=torch.tensor([state.timestep for state in states]),
        preference_B=torch.tensor([state.preference for state in states], dtype=torch.float32),
        label_B=torch.tensor([state.label for state in states], dtype=torch.float32),
        weight_B=torch.tensor([state.weight for state in states], dtype=torch.float32),
        ref_norm_B2=torch.stack(norms) if len(norms) == len(states) else None,
    )


def require_batch(batch: StateBatch | UserError) -> StateBatch:
    """Return the batch, or raise the error that :func:`collate` returned.

    Raises:
        UserError: a state of the batch is missing or damaged.
    """
    if isinstance(batch, UserError):
        raise batch
    return batch


class Feed:
    """The batches of a process, in order, from shards that are fetched and verified ahead."""

    def __init__(self, dataset: StateDataset, batching: Batching, store: ShardStore, rank: int, workers: int) -> None:
        """Serve process ``rank``.

        Args:
            dataset: the states.
            batching: their order.
            store: fetches and verifies the shards.
            rank: process, from 0.
            workers: loader processes; 0 reads in this process.
        """
        self.dataset, self.batching = dataset, batching
        self._store, self._rank, self._workers = store, rank, workers

    def batches(self, first_step: int, last_step: int) -> Generator[StateBatch, None, None]:
        """Yield the micro-batches of the steps ``first_step`` to ``last_step`` (excluded).

        Raises:
            UserError: a shard or a sample is missing or damaged.
        """
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._batches_when_fetched(first_step, last_step),
            num_workers=self._workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals_in_worker if self._workers else None,
        )
        for batch in loader:
            yield require_batch(batch)

    def _batches_when_fetched(self, first_step: int, last_step: int) -> Iterator[Sequence[int | UserError]]:
        """Yield the states of each micro-batch once its shards are fetched, or the error of a shard.

        The shards of the next window are fetched ahead. Those of the previous window are kept, since workers may still
        read its batches.
        """
        order, end = self.batching.order, last_step * self.batching.states_per_step
        in_use: list[Window] = []
        for positions in self.batching.micro_batches(first_step, last_step, self._rank):
            window = order.window_at(positions[-1])
            if not in_use or in_use[-1].first != window.first:
                first = window.first if in_use else positions[0]
                upcoming = [window, *([order.window_at(window.stop)] if window.stop < end else [])]
                in_use = [*in_use[-1:], window]
                kept = {shard for used in (*in_use, *upcoming) for shard in used.shards}
                self._store.release(self.dataset.files_of(kept))
                for next_window in upcoming:
                    needed = self._needed(next_window, max(next_window.first, first), end)
                    self._store.prefetch(self.dataset.files_of(needed))
            states = self.batching.states(positions)
            try:
                self._store.wait_for(sorted({order.shard_of(state) for state in states}))
            except UserError as error:
                yield [error]  # raised when this batch is due, not now, since it is read ahead
            else:
                yield states

    def _needed(self, window: Window, first: int, end: int) -> set[int]:
        """Return the shards of a window that this process reads between two global positions."""
        if first == window.first and window.stop <= end:
            return set(window.shards)
        # The run starts or ends within the window: leave out shards whose states are all outside.
        order, batching = self.batching.order, self.batching
        positions = range(first, min(window.stop, end))
        own = (p for p in positions if p // batching.batch_size % batching.world_size == self._rank)
        return {order.shard_of(order.state_at(position)) for position in own}
