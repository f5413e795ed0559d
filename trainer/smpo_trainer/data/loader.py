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
from smpo_trainer.data.order import Plan, Window
from smpo_trainer.data.state_table import StateTable, trajectory_digest
from smpo_trainer.interrupts import leave_signals_to_the_trainer
from smpo_trainer.shards.fetch import ShardStore
from smpo_trainer.shards.shard_set import ShardSet


@dataclass(frozen=True)
class State:
    """One state; the tensors as they are stored.

    ``problem`` says why it cannot be used, where it cannot; everything else is then made up, see :func:`stand_in`.
    """

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
    problem: str | None = None


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
        counts_B: bool, whether the state can be used: the others take part in the forward, and in nothing else.
        problems: why they cannot be used.
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
    counts_B: torch.Tensor
    problems: list[str]

    def to(self, device: torch.device) -> StateBatch:
        """The same with all tensors on ``device``."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def stand_in(problem: str, latent: tuple[int, ...]) -> State:
    """What takes the place of a state that cannot be used: it keeps batches, and the processes' forwards, alike.

    Its weight is 0 and everything in it is finite, so that it adds exactly 0 to a loss and its gradient.

    Args:
        problem: why.
        latent: the shape (C, h, w) of its latents, which are those of its batch.
    """
    nothing_2Chw = torch.zeros(2, *latent, dtype=torch.float16)
    return State(
        pair_id="",
        prompt="",
        size=((1, 1), (1, 1)),
        crop=((0, 0), (0, 0)),
        x0_2Chw=nothing_2Chw,
        noise_2Chw=nothing_2Chw,
        ref_error_2=torch.zeros(2),
        timestep=0,
        preference=1.0,  # a tie would have no preferred image, and NaN for its error
        label=1.0,
        weight=0.0,
        problem=problem,
    )


@dataclass(frozen=True)
class Unusable:
    """A state, by its number, of which it is known before it is read why it cannot be used."""

    state: int
    problem: str


class StateDataset(Dataset[State]):
    """The states of a table by their number.

    The problem of an :class:`Unusable` one, and what is found when one is read, becomes the ``problem`` of a
    :func:`stand_in`: an exception would come out of a loader process with that process's traceback in its message.

    Attributes:
        ref_error_S2: float32 [S, 2] to give instead of the stored reference errors; None: those.
    """

    def __init__(self, shards: ShardSet, table: StateTable) -> None:
        self._directories = [source.directory for source, _ in shards.places]
        self._table = table
        self.ref_error_S2: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int | Unusable) -> State:
        if isinstance(index, Unusable):
            return stand_in(index.problem, self._table.latent_of(index.state))
        if self.ref_error_S2 is not None and not self.ref_error_S2[index].isfinite().all():
            return stand_in(self._without_reference(index), self._table.latent_of(index))
        try:
            return self._read(index)
        except UserError as error:
            return stand_in(str(error), self._table.latent_of(index))

    def _without_reference(self, index: int) -> str:
        trajectory = int(self._table.trajectory_S[index])
        directory = self._directories[self._table.locations.shard_P[trajectory]]
        name = directory.manifest.shards[self._table.locations[trajectory].shard].name
        return (
            f"{directory.path / name} has states without a finite reference error: they could not be used when it was "
            "recomputed; --overwrite begins the run anew"
        )

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
        weight_B=torch.tensor([state.weight for state in states], dtype=torch.float32),
        counts_B=torch.tensor([state.problem is None for state in states]),
        problems=[state.problem for state in states if state.problem is not None],
    )


def require_usable(batch: StateBatch, *, skip_bad: bool) -> None:
    """Refuse a batch with a state that cannot be used, unless such states are to be skipped.

    Raises:
        UserError: there is one.
    """
    if batch.problems and not skip_bad:
        raise UserError(f"{batch.problems[0]} (--skip-bad goes on without what is damaged)")


def usable(state: int, problem: str | None) -> int | Unusable:
    """A state, with what is wrong with its shard, if anything is."""
    return state if problem is None else Unusable(state, problem)


class Feed:
    """A process's batches, in exactly the order of the plan, from shards that are here and found whole."""

    def __init__(
        self, dataset: StateDataset, plan: Plan, store: ShardStore, rank: int, workers: int, *, skip_bad: bool
    ) -> None:
        """Serve process ``rank``.

        Args:
            dataset: what is read.
            plan: in which order.
            store: brings the shards.
            rank: process.
            workers: processes that read ahead; 0: this one reads, when it is asked.
            skip_bad: whether states that cannot be used are given as such, rather than end the run.
        """
        self.dataset, self.plan = dataset, plan
        self._store, self._rank, self._workers, self._skip_bad = store, rank, workers, skip_bad

    def batches(self, first_step: int, last_step: int) -> Iterator[StateBatch]:
        """The micro-batches of the steps ``first_step`` to ``last_step`` (excluded).

        Raises:
            UserError: a shard or a sample is missing or damaged, and is not to be skipped.
        """
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._brought(first_step, last_step),
            num_workers=self._workers,
            collate_fn=collate,
            worker_init_fn=leave_signals_to_the_trainer if self._workers else None,
        )
        for batch in loader:
            require_usable(batch, skip_bad=self._skip_bad)
            yield batch

    def _brought(self, first_step: int, last_step: int) -> Iterator[list[int | Unusable]]:
        """The states of each micro-batch, given out when their shards are here; of one of a bad shard what is wrong.

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
            problems = self._store.problems(sorted({order.shard_of(state) for state in states}))
            yield [usable(state, problems.get(order.shard_of(state))) for state in states]

    def _needed(self, window: Window, first: int, end: int) -> set[int]:
        """The shards of a window that this process reads between two global positions."""
        if first == window.first and window.stop <= end:
            return set(window.shards)
        # Where a run goes on or ends within a window: not those whose states are all behind or beyond it.
        order, plan = self.plan.order, self.plan
        positions = range(first, min(window.stop, end))
        own = (place for place in positions if place // plan.batch_size % plan.world_size == self._rank)
        return {order.shard_of(order.state_at(place)) for place in own}
