"""States with their tensors: read, collated and brought along in the order of the plan.

Shape suffixes: B batch, 2 images, C h w a latent.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch.utils.data import DataLoader, Dataset

from smpo_schemas.errors import UserError
from smpo_trainer.plan import Plan, Window
from smpo_trainer.shard_set import ShardSet
from smpo_trainer.shard_store import ShardStore
from smpo_trainer.states import StateTable


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
        x0_B2Chw, noise_B2Chw: float16, as they are stored.
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


class StateDataset(Dataset[State | str]):
    """The states of a table by their number; one that cannot be read is the reason why, in words.

    An exception would come out of a loader process with that process's traceback in its message.

    Attributes:
        ref_error_S2: float32 [S, 2] to give instead of the stored reference errors; None: those.
    """

    def __init__(self, shards: ShardSet, table: StateTable) -> None:
        self._directories = [source.directory for source, _ in shards.places]
        self._table = table
        self.ref_error_S2: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> State | str:
        try:
            return self._read(index)
        except UserError as error:
            return str(error)

    def _read(self, index: int) -> State:
        walk, k = int(self._table.walk_S[index]), int(self._table.k_S[index])
        sample = self._directories[self._table.locations.shard_P[walk]].read(self._table.locations[walk])
        return State(
            pair_id=sample.meta.pair_id,
            prompt="" if sample.meta.prompt_dropped else sample.meta.prompt,
            size=sample.meta.size,
            crop=sample.meta.crop,
            x0_2Chw=sample.x0_2Chw,
            # Copied: a view would carry the walk's other states along, out of the loader process too.
            noise_2Chw=sample.noise_K2Chw[k].clone(),
            ref_error_2=(sample.ref_error_K2[k] if self.ref_error_S2 is None else self.ref_error_S2[index]).clone(),
            timestep=int(sample.timestep_K[k]),
            preference=float(self._table.preference_P[walk]),
            label=float(self._table.label_P[walk]),
            weight=float(self._table.weight_P[walk]),
        )


def collate(states: Sequence[State | str]) -> StateBatch | str:
    """Stack states into a batch, in order; where one cannot be read, why not."""
    problem = next((state for state in states if isinstance(state, str)), None)
    return problem or _stack([state for state in states if isinstance(state, State)])


def _stack(states: Sequence[State]) -> StateBatch:
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


class Feed:
    """A process's batches, in exactly the order of the plan, from shards that are here and found whole."""

    def __init__(self, dataset: StateDataset, plan: Plan, store: ShardStore, rank: int, workers: int) -> None:
        """Serve process ``rank``; ``workers`` processes read ahead (0: this one reads, when it is asked)."""
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
            worker_init_fn=_leave_signals_to_the_trainer if self._workers else None,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def _brought(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        """The states of each micro-batch, given out when their shards are here.

        One window of shards is fetched ahead of the one in use, and the one before is kept for batches under way.
        """
        order, end = self.plan.order, last_step * self.plan.states_per_step
        kept: list[Window] = []
        for positions in self.plan.micro_batches(first_step, last_step, self._rank):
            window = order.window_at(positions[-1])
            if not kept or kept[-1].first != window.first:
                ahead = [order.window_at(window.stop)] if window.stop < end else []
                kept = [*kept[-1:], window]
                self._store.release(shard for each in (*kept, *ahead) for shard in each.shards)
                self._store.expect(shard for each in (window, *ahead) for shard in each.shards)
            states = self.plan.states(positions)
            self._store.require(sorted({order.shard_of(state) for state in states}))
            yield states


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """A Ctrl-C reaches every process of the terminal: loaders go on, so that the trainer can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
