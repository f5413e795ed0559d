"""States with their tensors: read, collated and brought along in the order of the plan.

Shape suffixes: B batch, 2 images, C h w a latent.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch.utils.data import DataLoader, Dataset

from smpo_trainer.shard_set import ShardSet
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

    def to(self, device: torch.device) -> StateBatch:
        """The same with all tensors on ``device``."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class StateDataset(Dataset[State]):
    """The states of a table by their number.

    Attributes:
        ref_error_S2: float32 [S, 2] to give instead of the stored reference errors; None: those.
    """

    def __init__(self, shards: ShardSet, table: StateTable) -> None:
        self._shards = shards
        self._table = table
        self.ref_error_S2: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> State:
        walk, k = int(self._table.walk_S[index]), int(self._table.k_S[index])
        directory, location = self._table.locations[walk]
        sample = self._shards.directories[directory].read(location)
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
        )


def collate(states: Sequence[State]) -> StateBatch:
    """Stack states into a batch, in order."""
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
    )


def make_loader(dataset: StateDataset, micro_batches: Iterable[list[int]], workers: int) -> DataLoader[StateBatch]:
    """Batches in exactly the given order, read ahead by ``workers`` processes (0: by this one, when asked)."""
    return DataLoader(
        dataset,
        batch_sampler=micro_batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_the_trainer if workers else None,
    )


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """A Ctrl-C reaches every process of the terminal: loaders go on, so that the trainer can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
