"""``win_rates.png``: win rates against the baseline with their intervals, for a slide."""

from __future__ import annotations

import io

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smpo_pipeline.evaluation.report.charts import SERIES
from smpo_pipeline.evaluation.results import Results

_WIDTH = 9.0  # inches
_ROW, _PANEL = 0.42, 0.62  # inches of a model's row, and of a panel's title and margin
_DPI = 180
_COLOURS = ("#7a7f8a", "#2563c9", "#c2570c", "#0f8a6a", "#9333a8", "#b08900", "#c22762", "#0e7490")
"""Those of the page in its light scheme."""


@rc_context({"text.parse_math": False})
def draw_win_rates(results: Results) -> bytes:
    """Draw a panel per reward, a row per model; return a PNG. A dollar sign in a name does not start a formula."""
    others = [model.name for model in results.models if model.name != results.baseline]
    panels = len(results.rewards)
    size = (_WIDTH, panels * (_ROW * max(len(others), 1) + _PANEL) + 0.5)
    figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axis, reward in zip(axes, results.rewards, strict=True):
        _panel(axis, results, reward.name, others)
        axis.set_title(reward.name, loc="left", fontsize=11, fontweight="bold")
    axes[-1].set_xlabel(f"% of images that score higher than {results.baseline}'s, with 95 % intervals over prompts")
    picture = io.BytesIO()
    # Without software name and date, so that equal results give equal bytes.
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _panel(axis: Axes, results: Results, reward: str, models: list[str]) -> None:
    axis.axvline(50, color="#888888", linewidth=1)
    labels = []
    for place, name in enumerate(reversed(models)):
        number, model = next((n, each) for n, each in enumerate(results.models) if each.name == name)
        versus = results.finding(name, reward).versus_baseline
        standing = model.standing(reward)
        labels.append(f"{name} ({standing})" if standing else name)
        if versus is None:
            continue
        rate, colour = versus.win_rate, _COLOURS[number % SERIES]
        if rate.low is not None and rate.high is not None:
            axis.plot([100 * rate.low, 100 * rate.high], [place, place], color=colour, linewidth=5, alpha=0.4)
        axis.plot(100 * rate.value, place, marker="o", color=colour, markersize=8)
        axis.annotate(f"{100 * rate.value:.1f} %", (101.5, place), va="center", fontsize=10, annotation_clip=False)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(-0.6, len(labels) - 0.4)
    axis.set_xlim(0, 100)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
