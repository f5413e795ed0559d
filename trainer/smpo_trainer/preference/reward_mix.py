"""The rewards of an experiment: which ones, how they are mixed, and P(image_0 preferred) of every pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from smpo_common.errors import UserError
from smpo_schemas.calibration import Calibration, read_calibration
from smpo_schemas.preference import Preference, ScoredPairs, find_preference
from smpo_schemas.scores import RewardStatistics, read_scores_info
from smpo_schemas.shards.samples import SampleMeta
from smpo_trainer.named_values import parse_ranges
from smpo_trainer.preference.scores_table import PreferenceTable, preference_table
from smpo_trainer.presets import PRESETS
from smpo_trainer.settings import RewardOptions
from smpo_trainer.shards.shard_set import ShardSet

Range = tuple[float, float]
"""Minimum and maximum of a reward."""


@dataclass(frozen=True)
class RewardMix:
    """Rewards, mixed.

    Attributes:
        preference: how they are mixed, with their weights and scales.
        statistics: by reward name.
        ranges: by reward name, minimum and maximum that were given in place of the data set's.
        temperatures: by reward name, tau where a calibration gave one.
        table: the preferences that replace those of the shards' own scores; None: the shards' own.
    """

    preference: Preference
    statistics: Mapping[str, RewardStatistics]
    ranges: Mapping[str, Range]
    temperatures: Mapping[str, float] | None
    table: PreferenceTable | None

    def preferences(self, metas: Sequence[SampleMeta]) -> np.ndarray:
        """P(image_0 preferred) of each trajectory's pair: float64 [P], NaN where ``table`` lacks the pair.

        Raises:
            UserError: a trajectory in the shards lacks a reward that its manifest promises, or belongs to another pair.
        """
        if self.table is not None:
            return np.array([self.table.preference(meta) for meta in metas], dtype=np.float64)
        if not metas:
            return np.zeros(0)
        columns = {name: np.array([_of(name, meta) for meta in metas]) for name in self.preference.weights}
        return self.preference.probability(ScoredPairs(columns))

    def identity(self) -> dict[str, Any]:
        """What of the mix decides the numbers of a run, by the names that users know (JSON values)."""
        return {
            "preference": self.preference.name,
            "reward": dict(self.preference.weights),
            "reward_range": {name: list(limits) for name, limits in self.ranges.items()},
            # A calibration counts by the temperatures that it gave, besides the weights above.
            "calibration": None if self.temperatures is None else dict(self.temperatures),
            "scores": self.table.sha256 if self.table else None,
        }


def _of(name: str, meta: SampleMeta) -> tuple[float, float]:
    if name not in meta.scores:
        raise UserError(f"pair {meta.pair_id} in the shards has no score of reward {name!r}")
    return meta.scores[name]


def resolve_mix(options: RewardOptions, preset: str | None, shards: ShardSet, say: Callable[[str], None]) -> RewardMix:
    """Find the rewards in the shards, or in ``--scores``, and fix how they are mixed.

    Args:
        options: rewards, their ranges, the way of mixing, its calibration, the scores.
        preset: name of the preset; its ranges are no mistake where its reward is not used.
        shards: where the scores come from if no others are named.
        say: takes a line about rows that repeat a pair, or temperatures that were fitted to more rewards.

    Raises:
        UserError: a reward is not there, or none is named and there are several, or the flags do not fit.
    """
    info = read_scores_info(options.scores) if options.scores else None
    statistics = info.rewards if info else shards.reward_statistics()
    source = f"--scores {options.scores}" if info else "--shards"
    given = _given_ranges(options, preset)
    calibration = _read_calibration(options, given)
    weights = _weights(options, calibration, statistics, source)
    temperatures = _temperatures(calibration, weights, statistics, options.calibration, say) if calibration else None
    ranges = _ranges(options, given, weights)
    preference = find_preference(options.preference)(weights, _with_ranges(statistics, ranges), temperatures)
    if preference.needs_images and info is None:
        raise UserError(
            f"--preference {preference.name} compares all images of a prompt, which the shards may not hold; "
            "name the output of `smpo-pipeline score` with --scores"
        )
    table = preference_table(options.scores, info, preference, say) if options.scores and info else None
    return RewardMix(preference, statistics, ranges, temperatures, table)


def _read_calibration(options: RewardOptions, given: Mapping[str, Range]) -> Calibration | None:
    """The calibration, if the way of mixing takes one."""
    way = find_preference(options.preference)
    if options.calibration is None:
        if way.calibration == "required":
            raise UserError(f"--preference {way.name} needs --calibration FILE; make it with `smpo-pipeline calibrate`")
        return None
    if way.calibration == "refused":
        raise UserError(f"--preference {way.name} takes no --calibration; use it with --preference mixture or winrate")
    if given:
        raise UserError(f"--reward-range does nothing beside --calibration {options.calibration}, whose tau scales")
    return read_calibration(options.calibration)


def _weights(
    options: RewardOptions, calibration: Calibration | None, statistics: Mapping[str, RewardStatistics], source: str
) -> dict[str, float]:
    """Weights by name: as given, else the calibration's, else of the only reward."""
    weights = dict(options.reward)
    if not weights and calibration:
        weights = {name: reward.weight for name, reward in calibration.rewards.items()}
    listed = ", ".join(statistics) or "none"
    if not weights and len(statistics) != 1:
        raise UserError(f"{source} holds {len(statistics)} rewards ({listed}); choose with --reward NAME[:WEIGHT]")
    weights = weights or dict.fromkeys(statistics, 1.0)
    for name in weights:
        if name not in statistics:
            flag = f"--reward {name}" if name in options.reward else f"--calibration has the reward {name}"
            fix = "" if options.scores else "; a table that has it is named with --scores"
            raise UserError(f"{flag}: {source} holds no such reward; it holds: {listed}{fix}")
    return weights


def _temperatures(
    calibration: Calibration,
    weights: Mapping[str, float],
    statistics: Mapping[str, RewardStatistics],
    path: Path | None,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Tau by name, of the very models that were calibrated: as fitted in the mixture, or of the only reward alone."""
    for name in weights:
        if name not in calibration.rewards:
            raise UserError(f"--reward {name}: not in --calibration {path} ({', '.join(calibration.rewards)})")
        if calibration.rewards[name].fingerprint != statistics[name].fingerprint:
            raise UserError(
                f"--calibration {path}: its reward {name!r} is of another model ({calibration.rewards[name].model}, "
                f"here {statistics[name].model}); calibrate again with these scores"
            )
    if len(weights) == 1:
        return {name: calibration.rewards[name].tau_alone for name in weights}
    if len(weights) < len(calibration.rewards):
        say(
            f"WARNING: --reward takes {len(weights)} of the {len(calibration.rewards)} rewards of --calibration "
            f"{path}, whose tau were fitted beside the others; `smpo-pipeline calibrate --reward` fits these alone"
        )
    return {name: calibration.rewards[name].tau for name in weights}


def _ranges(options: RewardOptions, given: Mapping[str, Range], weights: Mapping[str, float]) -> dict[str, Range]:
    """Of the rewards in use; a calibration's temperatures take the place of all.

    Raises:
        UserError: a range was given of a reward that is not used.
    """
    for name in given:
        if name not in weights:
            raise UserError(f"--reward-range {name}: no such reward is used; used: {', '.join(weights)}")
    if options.calibration:
        return {}
    return {name: limits for name, limits in options.reward_range.items() if name in weights}


def _given_ranges(options: RewardOptions, preset: str | None) -> dict[str, Range]:
    """Without those of a preset, which holds them for its own reward and is no mistake beside others."""
    of_preset = PRESETS[preset].flags.get("reward_range", []) if preset else []
    known = parse_ranges(cast("list[str]", of_preset))
    return {name: limits for name, limits in options.reward_range.items() if known.get(name) != limits}


def _with_ranges(
    statistics: Mapping[str, RewardStatistics], ranges: Mapping[str, Range]
) -> dict[str, RewardStatistics]:
    return {
        name: found.model_copy(update=dict(zip(("min", "max"), ranges[name], strict=True))) if name in ranges else found
        for name, found in statistics.items()
    }
