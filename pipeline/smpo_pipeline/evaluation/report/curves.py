"""Read a training run's curves from the ``metrics.jsonl`` beside its model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from smpo_common.errors import UserError

_STEP = "step"
_FIRST = ("loss", "rewards/accuracies", "rewards/margins")
_MIN_POINTS = 2


def read_curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the metrics that change over a run: per name, the optimizer steps and the values.

    The most important ones come first. If a resumed run logged a step twice, the later line counts. Values that are
    not finite are dropped.

    Raises:
        UserError: a line is not a JSON object.
    """
    by_step: dict[float, dict[str, float]] = {}
    # After the last line break comes nothing, or a killed run's half line.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            by_step[row.get(_STEP, number)] = row
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: line {number} is not a JSON object: {error}") from error
    names = dict.fromkeys(name for row in by_step.values() for name in row if name != _STEP)
    curves = {}
    for name in [name for name in _FIRST if name in names] + [name for name in names if name not in _FIRST]:
        points = [(step, row[name]) for step, row in sorted(by_step.items()) if _is_number(row.get(name))]
        points_N2 = np.array(points, dtype=np.float64).reshape(-1, 2)
        if len(points_N2) >= _MIN_POINTS and np.ptp(points_N2[:, 1]) > 0:
            curves[name] = (points_N2[:, 0], points_N2[:, 1])
    return curves


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
