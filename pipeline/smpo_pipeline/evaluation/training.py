"""Curves of a training run, from the ``metrics.jsonl`` beside its model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from smpo_common.errors import UserError

_NOT_DRAWN = "step"
_DRAWN_FIRST = ("loss", "rewards/accuracies", "rewards/margins")
_FEWEST_POINTS = 2


def read_curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read every number that changes over a run: per name, the optimizer steps and the values.

    The ones that matter most come first. Of a step that was logged twice (a resumed run) the later line counts.
    Values that are not finite are left out.

    Raises:
        UserError: a line is not a JSON object.
    """
    by_step: dict[float, dict[str, float]] = {}
    # What follows the last line break is empty, or the half line of a run that was killed.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            by_step[row.get("step", number)] = row
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: line {number} is not a JSON object: {error}") from error
    found = dict.fromkeys(name for row in by_step.values() for name in row if name != _NOT_DRAWN)
    names = [name for name in _DRAWN_FIRST if name in found] + [name for name in found if name not in _DRAWN_FIRST]
    curves = {}
    for name in names:
        points = [(step, row[name]) for step, row in sorted(by_step.items()) if _is_number(row.get(name))]
        points_N2 = np.array(points, dtype=np.float64).reshape(-1, 2)
        if len(points_N2) >= _FEWEST_POINTS and np.ptp(points_N2[:, 1]) > 0:
            curves[name] = (points_N2[:, 0], points_N2[:, 1])
    return curves


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
