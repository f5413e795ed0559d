"""Which states there are to train on: a table in memory, without their tensors.

Shape suffixes: P walks, S states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smpo_schemas.errors import UserError
from smpo_schemas.shards import SampleLocation, SampleMeta
from smpo_trainer.objectives import Objective
from smpo_trainer.reward_mix import RewardMix
from smpo_trainer.shard_set import ShardSet


@dataclass(frozen=True)
class StateTable:
    """Every state that an experiment uses, in shard order.

    Attributes:
        locations: of each walk its directory's index and its place there.
        preference_P: P(image_0 preferred), NaN where there is none.
        label_P: the annotator's, NaN where nobody labelled.
        walk_S: which walk a state is of.
        k_S: which of the walk's states it is.
    """

    locations: tuple[tuple[int, SampleLocation], ...]
    preference_P: np.ndarray
    label_P: np.ndarray
    walk_S: np.ndarray
    k_S: np.ndarray

    def __len__(self) -> int:
        return len(self.walk_S)


def index_states(
    shards: ShardSet,
    objective: Objective,
    mix: RewardMix | None,
    timesteps: tuple[int | None, int | None],
    *,
    verify: bool,
    say: Callable[[str], None],
) -> StateTable:
    """Read through all shards once, and list the states that the objective can learn from.

    Args:
        shards: the data set.
        objective: decides which pairs are usable.
        mix: gives the preferences; None where the objective needs none.
        timesteps: smallest and largest timestep to use, both included; None: no limit.
        verify: check the tars' SHA-256 on the way.
        say: takes a line about what is left out.

    Raises:
        UserError: a shard is damaged, latents have several shapes, or nothing is left.
    """
    metas: list[SampleMeta] = []
    locations: list[tuple[int, SampleLocation]] = []
    timesteps_P: list[np.ndarray] = []
    shape: tuple[int, ...] | None = None
    for directory, location, sample in shards.samples(verify=verify):
        shape = shape or tuple(sample.x0_2Chw.shape)
        if tuple(sample.x0_2Chw.shape) != shape:
            path = shards.directories[directory].path
            found = tuple(sample.x0_2Chw.shape[1:])
            raise UserError(f"{path}: pair {sample.meta.pair_id} has latents of shape {found}, others of {shape[1:]}")
        metas.append(sample.meta)
        locations.append((directory, location))
        timesteps_P.append(sample.timestep_K.numpy())
    label_P = np.array([np.nan if meta.label is None else meta.label for meta in metas], dtype=np.float64)
    preference_P = mix.preferences(metas) if mix else np.full(len(metas), np.nan)
    usable_P = objective.usable(preference_P, label_P)
    low, high = timesteps
    walk_S, k_S = _select(timesteps_P, usable_P, low, high)
    total = sum(map(len, timesteps_P))
    if len(walk_S) == 0:
        raise UserError(
            f"no pair is left to train on: of {len(metas)} walks {int(usable_P.sum())} have {objective.needs}, as "
            f"--objective {objective.name} needs, and of their states none is within {_range(low, high)}"
        )
    if not usable_P.all():
        say(f"{int((~usable_P).sum())} of {len(metas)} walks lack {objective.needs} and are left out")
    say(f"{len(walk_S)} of {total} states of {len(metas)} walks are trained on")
    return StateTable(tuple(locations), preference_P, label_P, walk_S, k_S)


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
    return walk_S[keep], k_S[keep]


def _range(low: int | None, high: int | None) -> str:
    return f"timesteps {'0' if low is None else low} to {'the last' if high is None else high}"
