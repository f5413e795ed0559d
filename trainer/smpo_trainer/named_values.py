"""Flags that give a value to each name: ``NAME:WEIGHT``, ``NAME=VALUE`` and ``NAME=MIN:MAX``.

Each parser also takes the finished mapping, as Python code passes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from smpo_common.errors import UserError


def parse_rewards(texts: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Weights by name from ``NAME`` (weight 1) or ``NAME:WEIGHT``.

    Raises:
        UserError: a weight is not a finite number, or a name comes twice.
    """
    if isinstance(texts, Mapping):
        return dict(texts)
    weights: dict[str, float] = {}
    for text in texts:
        name, colon, number = text.partition(":")
        if "," in text:
            raise UserError(f"--reward {text}: several rewards are written --reward {' '.join(text.split(','))}")
        if "=" in name:
            raise UserError(f"--reward {text}: a weight is written {text.replace('=', ':')}")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise UserError(f"--reward {text}: expected NAME or NAME:WEIGHT with a number as weight")
        if name in weights:
            raise UserError(f"--reward {name} is given twice; its weight is one number")
        weights[name] = weight
    return weights


def write_rewards(weights: Mapping[str, float]) -> list[str]:
    """The reverse of :func:`parse_rewards`."""
    return [f"{name}:{weight!r}" for name, weight in weights.items()]


def parse_options(texts: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Values by name from ``NAME=VALUE``.

    Raises:
        UserError: one is not of that form, or a name comes twice.
    """
    if isinstance(texts, Mapping):
        return dict(texts)
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"--objective-option {text}: expected NAME=VALUE")
        if name in values:
            raise UserError(f"--objective-option {name} is given twice")
        values[name] = value
    return values


def write_options(values: Mapping[str, str]) -> list[str]:
    """The reverse of :func:`parse_options`."""
    return [f"{name}={value}" for name, value in values.items()]


def parse_ranges(texts: Sequence[str] | Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Minimum and maximum by reward name from ``NAME=MIN:MAX``, in units of the raw score.

    Only their difference counts: ``NAME=raw``, for scores that are log-odds, is 0 and 1.

    Raises:
        UserError: they are not finite numbers in rising order, or a name comes twice.
    """
    if isinstance(texts, Mapping):
        return dict(texts)
    ranges: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        numbers = "0:1" if numbers == "raw" else numbers
        try:
            low, high = (float(number) for number in numbers.split(":"))
        except ValueError:
            low = high = math.nan
        if not name or not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(
                f"--reward-range {text}: expected NAME=MIN:MAX with two numbers, the smaller one first, or NAME=raw"
            )
        if name in ranges:
            raise UserError(f"--reward-range {name} is given twice")
        ranges[name] = (low, high)
    return ranges


def write_ranges(ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """The reverse of :func:`parse_ranges`."""
    return [f"{name}={low!r}:{high!r}" for name, (low, high) in ranges.items()]
