"""The rewards of an experiment, their mix, and P(image_0 preferred) of every pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from smpo_common.errors import UserError
from smpo_common.named_values import parse_ranges
from smpo_schemas.preference import Preference, ScoredPairs, find_preference, preferences
from smpo_schemas.preference.scales import Range, calibrated_temperatures, refuse_unused_ranges, with_ranges
from smpo_schemas.scoring.calibration import Calibration, read_calibration
from smpo_schemas.scoring.scores import RewardStatistics, read_scores_info
from smpo_schemas.shards.samples import SampleMeta
from smpo_trainer.loss_settings import RewardOptions
from smpo_trainer.preference.preference_table import PreferenceTable, preference_table
from smpo_trainer.presets import PRESETS
from smpo_trainer.shards.shard_set import ShardSet


@dataclass(frozen=True)
class RewardMix:
    """A mix of rewards.

    Attributes:
        preference: how rewards are mixed, with weights and scales.
        statistics: statistics by reward name.
        ranges: minimum and maximum by reward name, if given in place of those of the data set.
        temperatures: tau by reward name, from a calibration; None without one.
        table: preferences from ``--scores``; None to use the scores in the shards.
    """

    preference: Preference
    statistics: Mapping[str, RewardStatistics]
    ranges: Mapping[str, Range]
    temperatures: Mapping[str, float] | None
    table: PreferenceTable | None

    def preferences(self, metas: Sequence[SampleMeta]) -> np.ndarray:
        """Compute P(image_0 preferred) of each trajectory's pair: float64 [P], NaN if ``table`` lacks the pair.

        Raises:
            UserError: a trajectory lacks a reward of its manifest, or ``table`` has another prompt for its pair.
        """
        if self.table is not None:
            return np.array([self.table.preference(meta) for meta in metas], dtype=np.float64)
        if not metas:  # the last chunk of an index
            return np.zeros(0)
        columns = {name: np.array([_scores(name, meta) for meta in metas]) for name in self.preference.weights}
        labels_P, votes_P = (_numbers(name, metas) for name in ("label", "votes"))
        return self.preference.probability(ScoredPairs(columns, labels_P=labels_P, votes_P=votes_P))

    def identity(self) -> dict[str, Any]:
        """Return what decides the results of a run, by flag name (JSON values)."""
        return {
            "preference": self.preference.name,
            "reward": dict(self.preference.weights),
            "reward_range": {name: list(limits) for name, limits in self.ranges.items()},
            # A calibration affects the run by what is here and by the weights above.
            "calibration": self._calibrated(),
            "scores": self.table.sha256 if self.table else None,
        }

    def _calibrated(self) -> dict[str, float] | None:
        if self.preference.uses_labels:
            return {**(self.temperatures or {}), "strength": self.preference.strength}
        return None if self.temperatures is None else dict(self.temperatures)


def _numbers(name: str, metas: Sequence[SampleMeta]) -> np.ndarray:
    values = (getattr(meta, name) for meta in metas)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _scores(name: str, meta: SampleMeta) -> tuple[float, float]:
    if name not in meta.scores:
        raise UserError(
            f"pair {meta.pair_id} in the shards has no score of reward {name!r}: score the pairs with it and name that "
            "folder by --scores, or take another --reward"
        )
    return meta.scores[name]


def resolve_mix(options: RewardOptions, preset: str | None, shards: ShardSet, say: Callable[[str], None]) -> RewardMix:
    """Find the rewards in the shards or in ``--scores``, and resolve their mix.

    Args:
        options: rewards, ranges, preference, calibration and scores.
        preset: name of the preset; its ranges are ignored if its reward is not used.
        shards: source of the scores without ``--scores``.
        say: prints a line about rows that repeat a pair, or about temperatures fitted together with other rewards.

    Raises:
        UserError: a reward is missing, none of several is chosen, or the flags do not fit each other.
    """
    info = read_scores_info(options.scores) if options.scores else None
    statistics = info.rewards if info else shards.reward_statistics()
    source = f"--scores {options.scores}" if info else "--shards"
    given = _given_ranges(options, preset)
    calibration = _read_calibration(options, given)
    weights = _weights(options, calibration, statistics, source)
    temperatures = (
        calibrated_temperatures(calibration, weights, statistics, options.calibration, say) if calibration else None
    )
    ranges = _ranges(options, given, weights)
    way = find_preference(options.preference)
    preference = way(weights, with_ranges(statistics, ranges), temperatures, way.strength_of(calibration))
    if preference.needs_images and info is None:
        raise UserError(
            f"--preference {preference.name} compares all images of a prompt, which the shards may not hold; give the "
            "output of `smpo-pipeline score` with --scores"
        )
    table = preference_table(options.scores, info, preference, say) if options.scores and info else None
    return RewardMix(preference, statistics, ranges, temperatures, table)


def _read_calibration(options: RewardOptions, given: Mapping[str, Range]) -> Calibration | None:
    """Read the calibration, if the preference takes one."""
    preference = find_preference(options.preference)
    if options.calibration is None:
        if preference.calibration == "required":
            raise UserError(
                f"--preference {preference.name} needs --calibration FILE; make it with `smpo-pipeline calibrate`"
            )
        return None
    if preference.calibration == "refused":
        others = " or ".join(name for name, way in sorted(preferences().items()) if way.calibration != "refused")
        raise UserError(f"--preference {preference.name} takes no --calibration; use it with --preference {others}")
    if given:
        raise UserError(
            f"--reward-range has no effect with --calibration {options.calibration}, which sets the scales; give one "
            "of them"
        )
    return read_calibration(options.calibration)


def _weights(
    options: RewardOptions, calibration: Calibration | None, statistics: Mapping[str, RewardStatistics], source: str
) -> dict[str, float]:
    """Return weights by name: those given, or the calibration's, or 1 for the only reward; none if none is used."""
    weights = dict(options.reward)
    if not find_preference(options.preference).uses_rewards:
        if weights:
            raise UserError(
                f"--preference {options.preference} uses no rewards; leave out --reward {', '.join(weights)}"
            )
        return {}
    if not weights and calibration:
        weights = {name: reward.weight for name, reward in calibration.rewards.items()}
    if not statistics:
        raise UserError(f"{source} has no scores; give the output of `smpo-pipeline score` with --scores")
    available = ", ".join(statistics)
    if not weights and len(statistics) != 1:
        raise UserError(f"{source} has {len(statistics)} rewards ({available}); choose with --reward NAME[:WEIGHT]")
    weights = weights or dict.fromkeys(statistics, 1.0)
    for name in weights:
        if name not in statistics:
            flag = f"--reward {name}" if name in options.reward else f"--calibration has the reward {name}"
            remedy = "" if options.scores else "; give a table that has it with --scores"
            raise UserError(f"{flag}: not in {source}, which has: {available}{remedy}")
    return weights


def _ranges(options: RewardOptions, given: Mapping[str, Range], weights: Mapping[str, float]) -> dict[str, Range]:
    """Return the ranges of the rewards in use; none with a calibration, whose temperatures replace them.

    Raises:
        UserError: a range is given for a reward that is not used.
    """
    refuse_unused_ranges(given, weights)
    if options.calibration:
        return {}
    return {name: limits for name, limits in options.reward_range.items() if name in weights}


def _given_ranges(options: RewardOptions, preset: str | None) -> dict[str, Range]:
    # A preset's own range is not an error if another reward is used.
    flags = PRESETS[preset].flags if preset else {}
    of_preset = parse_ranges("--reward-range", cast("list[str]", flags.get("reward_range", [])))
    return {name: limits for name, limits in options.reward_range.items() if of_preset.get(name) != limits}
