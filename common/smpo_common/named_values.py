"""Parse flags that give a value to each name: ``NAME:WEIGHT``, ``NAME=VALUE`` and ``NAME=MIN:MAX``.

Each parser takes the flag's name, for errors, and also accepts the finished mapping, as Python code passes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from smpo_common.errors import UserError

T = TypeVar("T")


def parse_weights(flag: str, texts: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Parse weights by name from ``NAME`` (weight 1) or ``NAME:WEIGHT``.

    Raises:
        UserError: a weight is not a finite number, or a name is given twice.
    """

    def parse(text: str) -> tuple[str, float]:
        if "," in text:
            raise UserError(f"{flag} {text}: separate several by spaces: {flag} {' '.join(text.split(','))}")
        name, colon, number = text.partition(":")
        if "=" in name:
            raise UserError(f"{flag} {text}: write the weight as {text.replace('=', ':')}")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise UserError(f"{flag} {text}: expected NAME or NAME:WEIGHT, with a finite number as weight")
        return name, weight

    return _parse(flag, texts, parse)


def write_weights(weights: Mapping[str, float]) -> list[str]:
    """Invert :func:`parse_weights`."""
    return [f"{name}:{weight!r}" for name, weight in weights.items()]


def parse_options(flag: str, texts: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Parse values by name from ``NAME=VALUE``.

    Raises:
        UserError: a text has another form, or a name is given twice.
    """

    def parse(text: str) -> tuple[str, str]:
        name, _, value = text.partition("=")
        if not (name and value):
            raise UserError(f"{flag} {text}: expected NAME=VALUE")
        return name, value

    return _parse(flag, texts, parse)


def write_options(values: Mapping[str, str]) -> list[str]:
    """Invert :func:`parse_options`."""
    return [f"{name}={value}" for name, value in values.items()]


def parse_ranges(flag: str, texts: Sequence[str] | Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Parse minimum and maximum by name from ``NAME=MIN:MAX``.

    ``NAME=raw`` means ``NAME=0:1``, which leaves differences of values unscaled.

    Raises:
        UserError: they are not finite numbers in increasing order, or a name is given twice.
    """

    def parse(text: str) -> tuple[str, tuple[float, float]]:
        name, _, numbers = text.partition("=")
        try:
            low, high = (float(number) for number in ("0:1" if numbers == "raw" else numbers).split(":"))
        except ValueError:
            low = high = math.nan
        if not name or not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"{flag} {text}: expected NAME=MIN:MAX with two numbers, MIN < MAX, or NAME=raw")
        return name, (low, high)

    return _parse(flag, texts, parse)


def write_ranges(ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """Invert :func:`parse_ranges`."""
    return [f"{name}={low!r}:{high!r}" for name, (low, high) in ranges.items()]


def _parse(flag: str, texts: Sequence[str] | Mapping[str, T], parse: Callable[[str], tuple[str, T]]) -> dict[str, T]:
    if isinstance(texts, Mapping):
        return dict(texts)
    values: dict[str, T] = {}
    for text in texts:
        name, value = parse(text)
        if name in values:
            raise UserError(f"{flag} {name} is given twice")
        values[name] = value
    return values
