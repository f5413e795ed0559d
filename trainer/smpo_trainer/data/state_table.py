"""The states to train on: a table in memory, without their tensors.

Shape suffixes: P trajectories, A all their states, S the states that are used.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice

import numpy as np

from smpo_common.errors import UserError
from smpo_schemas.shards.index import IndexedTrajectory
from smpo_schemas.shards.reader import SampleLocation
from smpo_trainer.objectives import Objective
from smpo_trainer.preference.pair_weights import PairWeights
from smpo_trainer.preference.reward_mix import RewardMix
from smpo_trainer.shards.shard_set import ShardSet
from smpo_trainer.shards.text import TextOfShards

_CHUNK = 4096
"""Trajectories held as Python objects at a time while the index is read."""


@dataclass(frozen=True)
class TrajectoryLocations:
    """Locations of trajectories, in arrays of about fifty bytes per trajectory.

    Attributes:
        shard_P: number of the shard in the set.
        number_P: number of the shard in its directory.
        key_P: key of the sample.
        parts_P4: offset and length of its two members.
        digest_P: :func:`trajectory_digest` of its row in the index.
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
        locations: where each trajectory is stored.
        preference_P: P(image_0 preferred) from rewards, NaN without scores.
        label_P: the annotator's P(image_0 preferred), NaN without a label.
        weight_P: weight of the pair in the loss.
        prompt_draw_P: :func:`prompt_draw` of the prompt.
        trajectory_S: trajectory of each state.
        k_S: number of each state in its trajectory.
        states_per_shard: number of states in each shard of the set.
        bucket_P: index of each trajectory's shape in ``latents``.
        text_P: number, among the files of the set, of the file that stores the prompt's embeddings; -1 where none does.
        latents: shapes (C, h, w) of the latents; several if images were put into buckets.
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
    text_P: np.ndarray
    latents: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.trajectory_S)

    def buckets(self) -> np.ndarray:
        """Return the index of each state's shape in ``latents``, [S]."""
        return self.bucket_P[self.trajectory_S]

    def latent_of(self, state: int) -> tuple[int, ...]:
        """Return the shape (C, h, w) of a state's latents."""
        return self.latents[self.bucket_P[self.trajectory_S[state]]]

    @cached_property
    def _text_of_shard(self) -> dict[int, set[int]]:
        used = np.unique(self.trajectory_S)
        shard_U, text_U = self.locations.shard_P[used], self.text_P[used]
        files: dict[int, set[int]] = {}
        for shard, text in np.unique(np.stack([shard_U, text_U], axis=1)[text_U >= 0], axis=0).tolist():
            files.setdefault(shard, set()).add(text)
        return files

    def files_of(self, shards: Iterable[int]) -> set[int]:
        """Return the numbers of some shards, and of the text files that their states need."""
        needed = set(shards)
        return needed.union(*(self._text_of_shard.get(shard, ()) for shard in needed))

    def only(self, keep_S: np.ndarray) -> StateTable:
        """Select states by a mask, bool [S]."""
        trajectory_S, k_S = self.trajectory_S[keep_S], self.k_S[keep_S]
        per_shard = _per_shard(self.locations, trajectory_S, len(self.states_per_shard))
        return replace(self, trajectory_S=trajectory_S, k_S=k_S, states_per_shard=per_shard)


def prompt_draw(prompt: str) -> float:
    """Hash a prompt to [0, 1). Prompts with a hash below ``--val-fraction`` are held out, in every run."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6]) / 2**48


def trajectory_digest(trajectory: IndexedTrajectory) -> int:
    """Return a checksum below 2^32, to detect a sample that differs from its row in the index."""
    meta = trajectory.meta
    content = (
        meta.pair_id,
        meta.trajectory,
        meta.prompt,
        meta.label,
        sorted(meta.scores.items()),
        trajectory.timesteps,
        trajectory.latent,
    )
    return zlib.crc32(repr(content).encode())


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
        objective: selects the usable pairs.
        mix: computes the preferences; None if the objective needs none.
        weights: weights of the pairs; None if all are 1. Pairs of weight 0 are left out.
        timesteps: smallest and largest timestep to use, both included; None for no limit.
        say: prints a line about pairs that are left out.

    Raises:
        UserError: an index is damaged, or no state is left.
    """
    latents: dict[tuple[int, ...], int] = {}  # number of each shape, in order of first occurrence
    trajectories = _read_trajectories(shards, mix, weights, latents)
    num_trajectories = len(trajectories.label_P)
    needs = objective.needs if mix is None or mix.preference.uses_rewards else mix.preference.needs
    usable_P = objective.usable(trajectories.preference_P, trajectories.label_P)
    if not usable_P.all():
        say(f"left out: {int((~usable_P).sum())} of {num_trajectories} trajectories without {needs}")
    if weights and not trajectories.weight_P.all():
        unweighted = int((trajectories.weight_P == 0).sum())
        say(f"left out: {unweighted} of {num_trajectories} trajectories without a weight in {weights.column}")
        usable_P &= trajectories.weight_P > 0
    low, high = timesteps
    trajectory_S, k_S = _select(trajectories, usable_P, low, high)
    if len(trajectory_S) == 0:
        raise UserError(
            f"no state to train on: {int(usable_P.sum())} of {num_trajectories} trajectories have {needs}"
            f"{' and a weight' if weights else ''}, as --objective {objective.name} needs{_limits(low, high)}"
        )
    say(f"training on {len(trajectory_S)} of {len(trajectories.timestep_A)} states of {num_trajectories} trajectories")
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
        trajectories.text_P,
        tuple(latents),
    )


@dataclass(frozen=True)
class _Trajectories:
    """Columns over all trajectories: arrays, since millions of objects would take gigabytes.

    Attributes:
        shard_P, number_P, key_P, parts_P4, digest_P: see :class:`TrajectoryLocations`.
        preference_P, label_P, weight_P, prompt_draw_P, bucket_P, text_P: see :class:`StateTable`.
        count_P: number of states.
        timestep_A: timesteps of all states, trajectory by trajectory.
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
    text_P: np.ndarray
    count_P: np.ndarray
    timestep_A: np.ndarray


def _read_trajectories(
    shards: ShardSet, mix: RewardMix | None, weights: PairWeights | None, latents: dict[tuple[int, ...], int]
) -> _Trajectories:
    """Read the indexes, chunk by chunk; numbers the shapes of the latents in ``latents``."""
    trajectories = shards.trajectories()
    parts: list[_Trajectories] = []
    while not parts or len(parts[-1].label_P):
        parts.append(_columns(list(islice(trajectories, _CHUNK)), mix, weights, latents, shards.text))
    return _Trajectories(
        *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(_Trajectories))
    )


def _columns(
    trajectories: Sequence[tuple[int, IndexedTrajectory]],
    mix: RewardMix | None,
    weights: PairWeights | None,
    latents: dict[tuple[int, ...], int],
    text: TextOfShards | None,
) -> _Trajectories:
    metas = [trajectory.meta for _, trajectory in trajectories]
    locations = [trajectory.location for _, trajectory in trajectories]
    timesteps = [t for _, trajectory in trajectories for t in trajectory.timesteps]
    labels = [np.nan if meta.label is None else meta.label for meta in metas]
    return _Trajectories(
        shard_P=np.array([shard for shard, _ in trajectories], dtype=np.int32),
        number_P=np.array([location.shard for location in locations], dtype=np.int32),
        key_P=np.array([location.key for location in locations], dtype=np.bytes_),
        parts_P4=np.array([[*at.meta, *at.tensors] for at in locations], dtype=np.int64).reshape(-1, 4),
        digest_P=np.array([trajectory_digest(trajectory) for _, trajectory in trajectories], dtype=np.uint32),
        preference_P=mix.preferences(metas) if mix else np.full(len(metas), np.nan),
        label_P=np.array(labels, dtype=np.float64),
        weight_P=weights.lookup(metas) if weights else np.ones(len(metas)),
        prompt_draw_P=np.array([prompt_draw(meta.prompt) for meta in metas], dtype=np.float64),
        bucket_P=np.array(
            [latents.setdefault(trajectory.latent, len(latents)) for _, trajectory in trajectories], dtype=np.int32
        ),
        text_P=text.files_of([meta.used_prompt for meta in metas]) if text else np.full(len(metas), -1, dtype=np.int32),
        count_P=np.array([len(trajectory.timesteps) for _, trajectory in trajectories], dtype=np.int32),
        # 64 bits even for absurd values: without an index, timesteps are only checked when a state is read.
        timestep_A=np.array(timesteps, dtype=np.float64 if any(isinstance(t, float) for t in timesteps) else np.int64),
    )


def _select(
    trajectories: _Trajectories, usable_P: np.ndarray, low: int | None, high: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (trajectory, k) of every state of a usable trajectory within the timesteps."""
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
    """Count the states in each shard."""
    return tuple(np.bincount(locations.shard_P[trajectory_S], minlength=num_shards).tolist())


def _limits(low: int | None, high: int | None) -> str:
    given = {"--min-timestep": low, "--max-timestep": high}
    flags = " ".join(f"{flag} {value}" for flag, value in given.items() if value is not None)
    return f", and none of their states is within {flags}" if flags else ""
