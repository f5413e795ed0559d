"""Which states there are to train on: a table in memory, without their tensors.

Shape suffixes: P walks, S states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from smpo_schemas.errors import UserError
from smpo_schemas.shards import SampleLocation, SampleMeta
from smpo_trainer.objectives import Objective
from smpo_trainer.pair_weights import PairWeights
from smpo_trainer.reward_mix import RewardMix
from smpo_trainer.shard_set import ShardSet


class WalkLocations:
    """Where walks lie, in arrays: some fifty bytes each."""

    def __init__(self, walks: Sequence[tuple[int, SampleLocation]]) -> None:
        """Take of each walk its shard of the set, and its location in its directory."""
        self.shard_P = np.array([shard for shard, _ in walks], dtype=np.int32)
        self._number_P = np.array([place.shard for _, place in walks], dtype=np.int32)
        self._key_P = np.array([place.key for _, place in walks], dtype=np.bytes_)
        self._parts_P4 = np.array([[*place.meta, *place.tensors] for _, place in walks], dtype=np.int64)

    def __getitem__(self, walk: int) -> SampleLocation:
        meta_offset, meta_bytes, offset, length = self._parts_P4[walk].tolist()
        key = self._key_P[walk].decode()
        return SampleLocation(int(self._number_P[walk]), key, (meta_offset, meta_bytes), (offset, length))


@dataclass(frozen=True)
class StateTable:
    """Every state that an experiment uses, in shard order.

    Attributes:
        locations: of each walk.
        preference_P: P(image_0 preferred), NaN where there is none.
        label_P: the annotator's, NaN where nobody labelled.
        weight_P: the pair's own weight in the loss.
        prompt_draw_P: of :func:`prompt_draw`.
        walk_S: which walk a state is of.
        k_S: which of the walk's states it is.
        states_per_shard: how many states lie in each shard of the set.
        latent: the shape (C, h, w) of all latents.
    """

    locations: WalkLocations
    preference_P: np.ndarray
    label_P: np.ndarray
    weight_P: np.ndarray
    prompt_draw_P: np.ndarray
    walk_S: np.ndarray
    k_S: np.ndarray
    states_per_shard: tuple[int, ...]
    latent: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.walk_S)

    def only(self, keep_S: np.ndarray) -> StateTable:
        """The table with those states alone."""
        walk_S, k_S = self.walk_S[keep_S], self.k_S[keep_S]
        per_shard = _per_shard(self.locations, walk_S, len(self.states_per_shard))
        return replace(self, walk_S=walk_S, k_S=k_S, states_per_shard=per_shard)


def prompt_draw(prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt alone; prompts below a fraction are held out at that fraction."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6]) / 2**48


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
        UserError: an index is damaged, latents have several shapes, or nothing is left.
    """
    metas: list[SampleMeta] = []
    locations: list[tuple[int, SampleLocation]] = []
    timesteps_P: list[np.ndarray] = []
    shape: tuple[int, ...] | None = None
    places = shards.places
    for shard, walk in shards.walks():
        shape = shape or walk.latent
        if walk.latent != shape:
            name = places[shard][0].name
            raise UserError(f"{name}: pair {walk.meta.pair_id} has latents of shape {walk.latent}, others of {shape}")
        metas.append(walk.meta)
        locations.append((shard, walk.location))
        timesteps_P.append(np.array(walk.timesteps))
    label_P = np.array([np.nan if meta.label is None else meta.label for meta in metas], dtype=np.float64)
    preference_P = mix.preferences(metas) if mix else np.full(len(metas), np.nan)
    weight_P = weights.of(metas) if weights else np.ones(len(metas))
    draw_P = np.array([prompt_draw(meta.prompt) for meta in metas], dtype=np.float64)
    usable_P = objective.usable(preference_P, label_P)
    if not usable_P.all():
        say(f"{int((~usable_P).sum())} of {len(metas)} walks lack {objective.needs} and are left out")
    if weights and not weight_P.all():
        say(f"{int((weight_P == 0).sum())} of {len(metas)} walks have no weight in {weights.column} and are left out")
        usable_P &= weight_P > 0
    low, high = timesteps
    walk_S, k_S = _select(timesteps_P, usable_P, low, high)
    total = sum(map(len, timesteps_P))
    if len(walk_S) == 0:
        raise UserError(
            f"no pair is left to train on: of {len(metas)} walks {int(usable_P.sum())} have {objective.needs}"
            f"{' and a weight' if weights else ''}, as "
            f"--objective {objective.name} needs, and of their states none is within {_range(low, high)}"
        )
    say(f"{len(walk_S)} of {total} states of {len(metas)} walks are trained on")
    placed = WalkLocations(locations)
    per_shard = _per_shard(placed, walk_S, len(places))
    return StateTable(placed, preference_P, label_P, weight_P, draw_P, walk_S, k_S, per_shard, shape or ())


def _select(
    timesteps_P: list[np.ndarray], usable_P: np.ndarray, low: int | None, high: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(walk, k) of every state of a usable walk within the timesteps."""
    counts = [len(timesteps) for timesteps in timesteps_P]
    walk_S = np.repeat(np.arange(len(counts)), counts)
    k_S = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, dtype=np.int64)
    t_S = np.concatenate(timesteps_P) if counts else np.zeros(0, dtype=np.int64)
    keep = usable_P[walk_S] if counts else np.zeros(0, dtype=bool)
    if low is not None:
        keep &= t_S >= low
    if high is not None:
        keep &= t_S <= high
    return walk_S[keep].astype(np.int32), k_S[keep].astype(np.int16)


def _per_shard(locations: WalkLocations, walk_S: np.ndarray, num_shards: int) -> tuple[int, ...]:
    """How many of the states lie in each shard."""
    return tuple(np.bincount(locations.shard_P[walk_S], minlength=num_shards).tolist())


def _range(low: int | None, high: int | None) -> str:
    return f"timesteps {'0' if low is None else low} to {'the last' if high is None else high}"
