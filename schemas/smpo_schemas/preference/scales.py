"""The scale of each reward in a mix: a calibration's temperature, or the range of its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from smpo_common.errors import UserError
from smpo_schemas.scoring.calibration import Calibration
from smpo_schemas.scoring.scores import RewardStatistics

Range = tuple[float, float]
"""Minimum and maximum of a reward."""


def calibrated_temperatures(
    calibration: Calibration,
    weights: Mapping[str, float],
    statistics: Mapping[str, RewardStatistics],
    path: Path | None,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Return tau by name: fitted together for a mixture, or alone for a single reward.

    Raises:
        UserError: a reward was not calibrated, or with another model.
    """
    for name in weights:
        if name not in calibration.rewards:
            raise UserError(f"--reward {name}: not in --calibration {path} ({', '.join(calibration.rewards)})")
        if calibration.rewards[name].fingerprint != statistics[name].fingerprint:
            raise UserError(
                f"--calibration {path}: reward {name!r} was calibrated with the model "
                f"{calibration.rewards[name].model}, but the scores are from {statistics[name].model}; run "
                "`smpo-pipeline calibrate` on these scores"
            )
    if len(weights) == 1:
        return {name: calibration.rewards[name].tau_alone for name in weights}
    if 0 < len(weights) < len(calibration.rewards):
        say(
            f"WARNING: --reward uses {len(weights)} of the {len(calibration.rewards)} rewards of --calibration {path}, "
            "whose temperatures were fitted together; fit these alone with `smpo-pipeline calibrate --reward`"
        )
    return {name: calibration.rewards[name].tau for name in weights}


def refuse_unused_ranges(given: Iterable[str], weights: Mapping[str, float]) -> None:
    """Check that a range is given only for rewards that are used.

    Raises:
        UserError: one is given for another reward.
    """
    for name in given:
        if name not in weights:
            raise UserError(f"--reward-range {name}: this reward is not used; used: {', '.join(weights)}")


def with_ranges(statistics: Mapping[str, RewardStatistics], ranges: Mapping[str, Range]) -> dict[str, RewardStatistics]:
    """Replace minimum and maximum over the data set by those given."""
    return {
        name: reward.model_copy(update=dict(zip(("min", "max"), ranges[name], strict=True)))
        if name in ranges
        else reward
        for name, reward in statistics.items()
    }
