"""Which states there are to train on: a table in memory, without their tensors.

Shape suffixes: P trajectories, A all their states, S the states that are used.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np

from smpo_common.errors import UserError
from smpo_schemas.shards.index import IndexedTrajectory
from smpo_schemas.shards.reader import SampleLocation
from smpo_trainer.objectives import Objective
from smpo_trainer.preference.pair_weights import PairWeights
from smpo_trainer.preference.reward_mix import RewardMix
from smpo_trainer.shards.shard_set import ShardSet

_CHUNK = 4096
"""Trajectories that are objects at once, while the index is read."""


@dataclass(frozen=True)
class TrajectoryLocations:
    """Where trajectories lie, in arrays: some fifty bytes each.

    Attributes:
        shard_P: shard of the set.
        number_P: the same shard's number in its directory.
        key_P: key of the sample.
        parts_P4: offset and length of its two members.
        digest_P: :func:`trajectory_digest` of what the index says of it.
    """

    shard_P: np.ndarray
    number_P: np.ndarray
    key_P: np.ndarray
    parts_P4: np.ndarray
    digest_P: np.ndarray

    def __getitem__(self, trajectory: int) -> SampleLocation:
        meta_offset, meta_bytes, offset, length = self.parts_P4[trajectory].tolist()
        key = self.key_P[trajectory].decode()
        return SampleLocation(int(self.number_P[trajectory]), key, (meta_offset, meta_bytes), (offset, length))


@dataclass(frozen=True)
class StateTable:
    """Every state that an experiment uses, in shard order.

    Attributes:
        locations: of each trajectory.
        preference_P: P(image_0 preferred), NaN where there is none.
        label_P: the annotator's, NaN where nobody labelled.
        weight_P: the pair's own weight in the loss.
        prompt_draw_P: of :func:`prompt_draw`.
        trajectory_S: which trajectory a state is of.
        k_S: which of the trajectory's states it is.
        states_per_shard: how many states lie in each shard of the set.
        bucket_P: which of ``latents`` a trajectory's are.
        latents: the shapes (C, h, w) of the latents; several where images were put into buckets.
    """

    locations: TrajectoryLocations
    preference_P: np.ndarray
    label_P: np.ndarray
    weight_P: np.ndarray
    prompt_draw_P: np.ndarray
    trajectory_S: np.ndarray
    k_S: np.ndarray
    states_per_shard: tuple[int, ...]
    bucket_P: np.ndarray
    latents: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.trajectory_S)

    def buckets(self) -> np.ndarray:
        """Which of ``latents`` a state's are, of all states: [S]."""
        return self.bucket_P[self.trajectory_S]

    def latent_of(self, state: int) -> tuple[int, ...]:
        """The shape (C, h, w) of a state's latents."""
        return self.latents[self.bucket_P[self.trajectory_S[state]]]

    def only(self, keep_S: np.ndarray) -> StateTable:
        """The table with those states alone."""
        trajectory_S, k_S = self.trajectory_S[keep_S], self.k_S[keep_S]
        per_shard = _per_shard(self.locations, trajectory_S, len(self.states_per_shard))
        return replace(self, trajectory_S=trajectory_S, k_S=k_S, states_per_shard=per_shard)


def prompt_draw(prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt alone; prompts below a fraction are held out at that fraction."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6]) / 2**48


def trajectory_digest(trajectory: IndexedTrajectory) -> int:
    """A number below 2^32 that is another one where a sample is not what the index says of it."""
    meta = trajectory.meta
    told = (
        meta.pair_id,
        meta.trajectory,
        meta.prompt,
        meta.label,
        sorted(meta.scores.items()),
        trajectory.timesteps,
        trajectory.latent,
    )
    return zlib.crc32(repr(told).encode())


def index_states(
    shards: ShardSet,
    objective: Objective,
    mix: RewardMix | None,
    weights: PairWeights | None,
    timesteps: tuple[int | None, int | None],
    *,
    say: Callable[[str], None],
) -> StateTable:
    """List the states that the objective can learn from.

    Args:
        shards: the data set.
        objective: decides which pairs are usable.
        mix: gives the preferences; None where the objective needs none.
        weights: of the pairs; None: all 1. A pair of weight 0 is left out.
        timesteps: smallest and largest timestep to use, both included; None: no limit.
        say: takes a line about what is left out.

    Raises:
        UserError: an index is damaged, or nothing is left.
    """
    latents: dict[tuple[int, ...], int] = {}
    trajectories = _read_trajectories(shards, mix, weights, latents)
    num_trajectories = len(trajectories.label_P)
    usable_P = objective.usable(trajectories.preference_P, trajectories.label_P)
    if not usable_P.all():
        say(f"{int((~usable_P).sum())} of {num_trajectories} trajectories lack {objective.needs} and are left out")
    if weights and not trajectories.weight_P.all():
        without = int((trajectories.weight_P == 0).sum())
        say(f"{without} of {num_trajectories} trajectories have no weight in {weights.column} and are left out")
        usable_P &= trajectories.weight_P > 0
    low, high = timesteps
    trajectory_S, k_S = _select(trajectories, usable_P, low, high)
    if len(trajectory_S) == 0:
        raise UserError(
            f"no pair is left to train on: of {num_trajectories} trajectories {int(usable_P.sum())} have "
            f"{objective.needs}{' and a weight' if weights else ''}, as --objective {objective.name} needs, and of "
            f"their states none is within {_range(low, high)}"
        )
    say(
        f"{len(trajectory_S)} of {len(trajectories.timestep_A)} states of {num_trajectories} trajectories "
        "are trained on"
    )
    locations = TrajectoryLocations(
        trajectories.shard_P, trajectories.number_P, trajectories.key_P, trajectories.parts_P4, trajectories.digest_P
    )
    return StateTable(
        locations,
        trajectories.preference_P,
        trajectories.label_P,
        trajectories.weight_P,
        trajectories.prompt_draw_P,
        trajectory_S,
        k_S,
        _per_shard(locations, trajectory_S, len(shards.places)),
        trajectories.bucket_P,
        tuple(latents),
    )


@dataclass(frozen=True)
class _Trajectories:
    """What is kept of all trajectories, in arrays: of millions, objects would take gigabytes.

    Attributes:
        shard_P, number_P, key_P, parts_P4, digest_P: see :class:`TrajectoryLocations`.
        preference_P, label_P, weight_P, prompt_draw_P, bucket_P: see :class:`StateTable`.
        count_P: how many states it has.
        timestep_A: of all states, trajectory after trajectory.
    """

    shard_P: np.ndarray
    number_P: np.ndarray
    key_P: np.ndarray
    parts_P4: np.ndarray
    digest_P: np.ndarray
    preference_P: np.ndarray
    label_P: np.ndarray
    weight_P: np.ndarray
    prompt_draw_P: np.ndarray
    bucket_P: np.ndarray
    count_P: np.ndarray
    timestep_A: np.ndarray


def _read_trajectories(
    shards: ShardSet, mix: RewardMix | None, weights: PairWeights | None, latents: dict[tuple[int, ...], int]
) -> _Trajectories:
    """Read the indexes, some trajectories at a time; ``latents`` takes the shapes that occur, each with its number."""
    trajectories = shards.trajectories()
    parts: list[_Trajectories] = []
    while not parts or len(parts[-1].label_P):
        parts.append(_columns(list(islice(trajectories, _CHUNK)), mix, weights, latents))
    return _Trajectories(
        *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(_Trajectories))
    )


def _columns(
    trajectories: Sequence[tuple[int, IndexedTrajectory]],
    mix: RewardMix | None,
    weights: PairWeights | None,
    latents: dict[tuple[int, ...], int],
) -> _Trajectories:
    metas = [trajectory.meta for _, trajectory in trajectories]
    places = [trajectory.location for _, trajectory in trajectories]
    labels = [np.nan if meta.label is None else meta.label for meta in metas]
    return _Trajectories(
        shard_P=np.array([shard for shard, _ in trajectories], dtype=np.int32),
        number_P=np.array([place.shard for place in places], dtype=np.int32),
        key_P=np.array([place.key for place in places], dtype=np.bytes_),
        parts_P4=np.array([[*place.meta, *place.tensors] for place in places], dtype=np.int64).reshape(-1, 4),
        digest_P=np.array([trajectory_digest(trajectory) for _, trajectory in trajectories], dtype=np.uint32),
        preference_P=mix.preferences(metas) if mix else np.full(len(metas), np.nan),
        label_P=np.array(labels, dtype=np.float64),
        weight_P=weights.of(metas) if weights else np.ones(len(metas)),
        prompt_draw_P=np.array([prompt_draw(meta.prompt) for meta in metas], dtype=np.float64),
        bucket_P=np.array(
            [latents.setdefault(trajectory.latent, len(latents)) for _, trajectory in trajectories], dtype=np.int32
        ),
        count_P=np.array([len(trajectory.timesteps) for _, trajectory in trajectories], dtype=np.int32),
        # What a tar without an index says of them is only checked when a state is read.
        timestep_A=np.array([t for _, trajectory in trajectories for t in trajectory.timesteps], dtype=np.int64),
    )


def _select(
    trajectories: _Trajectories, usable_P: np.ndarray, low: int | None, high: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(trajectory, k) of every state of a usable trajectory within the timesteps."""
    count_P = trajectories.count_P
    first_P = np.cumsum(count_P, dtype=np.int64) - count_P
    keep_A = np.repeat(usable_P, count_P)
    if low is not None:
        keep_A &= trajectories.timestep_A >= low
    if high is not None:
        keep_A &= trajectories.timestep_A <= high
    state_S = np.flatnonzero(keep_A)
    trajectory_S = np.repeat(np.arange(len(count_P), dtype=np.int32), count_P)[state_S]
    return trajectory_S, (state_S - first_P[trajectory_S]).astype(np.int16)


def _per_shard(locations: TrajectoryLocations, trajectory_S: np.ndarray, num_shards: int) -> tuple[int, ...]:
    """How many of the states lie in each shard."""
    return tuple(np.bincount(locations.shard_P[trajectory_S], minlength=num_shards).tolist())


def _range(low: int | None, high: int | None) -> str:
    return f"timesteps {'0' if low is None else low} to {'the last' if high is None else high}"
