"""Small inline SVG charts; their colours come from the page's style, so that they follow its light or dark scheme.

A chart is :data:`WIDTH` pixels wide at scale 1, so that its text is readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH = 340
_HEIGHT = 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 10, 24
_BINS = 32
SERIES = 8
"""Number of colours in the page's style; further models begin again."""
_MAX_POINTS = 400
_SMOOTHING_SHARE = 0.08  # window of the running mean, as a share of all points


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Choose about ``count`` round numbers in [low, high]."""
    raw = (high - low) / count
    if not raw > 0:
        return [low]
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


class _Axes:
    """Maps data to chart coordinates and draws grid and labels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = _non_empty(x), _non_empty(y)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Convert a data point to chart coordinates."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, xs: np.ndarray, ys: np.ndarray) -> str:
        """Make SVG path data through the points."""
        points = (self.place(x, y) for x, y in zip(xs, ys, strict=True))
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)

    def frame(self, percent: bool = False) -> list[str]:
        """Draw grid lines and tick labels."""
        parts = []
        for value in ticks(*self.y):
            x, y = self.place(self.x[0], value)
            label = f"{value * 100:g} %" if percent else f"{value:.4g}"
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{x - 5:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
        for value in ticks(*self.x):
            x, y = self.place(value, self.y[0])
            parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:.4g}</text>')
        return parts


def _non_empty(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _svg(parts: Sequence[str], description: str) -> Markup:
    label = escape(description)
    body = "".join(parts)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    return Markup(f"{head}<title>{label}</title>{body}</svg>")  # noqa: S704  (numbers, and the escaped label)


def distribution(scores: Mapping[str, np.ndarray], description: str) -> Markup:
    """Draw histograms of the models' scores over common bins, as shares of images, with dashed lines at the medians."""
    pooled = np.concatenate([np.ravel(values) for values in scores.values()])
    edges = np.linspace(*_non_empty((float(pooled.min()), float(pooled.max()))), _BINS + 1)
    shares = {name: np.histogram(values, edges)[0] / np.size(values) for name, values in scores.items()}
    axes = _Axes((edges[0], edges[-1]), (0.0, max(float(share.max()) for share in shares.values()) * 1.05))
    parts = axes.frame(percent=True)
    for number, (name, share) in enumerate(shares.items()):
        xs = np.concatenate([[edges[0]], np.repeat(edges, 2)[1:-1], [edges[-1]]])
        ys = np.concatenate([[0.0], np.repeat(share, 2), [0.0]])
        colour = f"series-{number % SERIES}"
        parts.append(f'<path class="area {colour}" d="{axes.path(xs, ys)}"/>')
        x, bottom = axes.place(float(np.median(scores[name])), 0.0)
        parts.append(f'<line class="median {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom:.1f}"/>')
    return _svg(parts, description)


def curve(steps: np.ndarray, values: np.ndarray, description: str) -> Markup:
    """Draw one quantity over optimizer steps: the values faintly, their running mean on top."""
    window = max(1, round(len(values) * _SMOOTHING_SHARE))
    kernel = np.ones(window)
    # Divide by the number of values under the window, which is smaller at the ends.
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
    drawn = np.unique(np.linspace(0, len(values) - 1, min(len(values), _MAX_POINTS)).round().astype(int))
    axes = _Axes((float(steps[0]), float(steps[-1])), (float(values.min()), float(values.max())))
    parts = axes.frame()
    parts.append(f'<path class="line faint series-1" d="{axes.path(steps[drawn], values[drawn])}"/>')
    parts.append(f'<path class="line series-1" d="{axes.path(steps[drawn], smooth[drawn])}"/>')
    return _svg(parts, description)
