"""Plot a calibration: reliability of each reward and mix, their log-loss, agreement by annotator."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smpo_common.errors import one_line
from smpo_common.files import write_bytes
from smpo_pipeline.calibration.calibrate import CalibrationResult
from smpo_pipeline.calibration.cross_validation import COIN
from smpo_schemas.scoring.calibration import Fit

_COLUMNS = 4
_SIDE = 3.0  # inches of a panel
_DPI = 110
_MAX_DOT = 220  # points squared: the dot of a bin with all labels
_MAX_NAME = 30  # characters of an annotator's name
_BLUE, _GREY = "#2a6fbb", "#999999"


@rc_context({"text.parse_math": False})
def save_plot(report: CalibrationResult, target: Path) -> None:
    """Write the PNG; a dollar sign in a name does not start a formula."""
    panels = {name: fit for name, fit in report.calibration.held_out.items() if name != COIN}
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(_COLUMNS * _SIDE, (rows + 1.3) * _SIDE), layout="constrained", dpi=_DPI)
    above, below = figure.subfigures(2, 1, height_ratios=[rows, 1.3])
    axes = above.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    above.suptitle(
        "How often people choose the image that p prefers (held out; a dot's area shows its number of labels)"
    )
    for axis, (name, fit) in zip(axes, panels.items(), strict=False):
        _reliability(axis, name, fit)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    above.supxlabel("p of the preferred image")
    above.supylabel("share of labels that prefer it")
    left, right = below.subplots(1, 2)
    _losses(left, {name: fit.log_loss for name, fit in report.calibration.held_out.items()}, report.held_out.chosen)
    _annotators(right, report)
    picture = io.BytesIO()
    # Without software name and date, so that equal calibrations give equal bytes.
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_bytes(target, picture.getvalue())


def _reliability(axis: Axes, name: str, fit: Fit) -> None:
    labels = np.array([item.labels for item in fit.bins])
    mean_p = np.array([item.mean_p for item in fit.bins])
    chosen = [item.share_chosen for item in fit.bins]
    # Standard error of a share, as if all labels were decided.
    error = np.sqrt(np.maximum(mean_p * (1 - mean_p), 0) / labels)
    axis.plot([0.5, 1], [0.5, 1], color=_GREY, linewidth=1, linestyle="--")
    axis.errorbar(mean_p, chosen, yerr=error, color=_BLUE, linewidth=1.2, elinewidth=0.8)
    axis.scatter(mean_p, chosen, 6 + _MAX_DOT * labels / labels.sum(), color=_BLUE, alpha=0.6)
    axis.set_xlim(0.48, 1.02)
    axis.set_ylim(0, 1.05)
    agrees = "" if fit.agreement is None else f"agrees {100 * fit.agreement:.1f} %, "
    axis.set_title(f"{name}\n{agrees}log-loss {fit.log_loss:.3f}, ECE {fit.calibration_error:.3f}", fontsize=8)


def _losses(axis: Axes, losses: dict[str, float], chosen: str) -> None:
    places = np.arange(len(losses))[::-1]
    colours = [_BLUE if name == chosen else _GREY for name in losses]
    axis.barh(places, list(losses.values()), color=colours)
    axis.set_yticks(places, list(losses), fontsize=8)
    axis.set_xlim(min(losses.values()) * 0.9, max(losses.values()) * 1.02)
    axis.set_title("held-out log-loss (nats; lower is better; the axis does not start at 0)", fontsize=9)


def _annotators(axis: Axes, report: CalibrationResult) -> None:
    mixture = report.annotators[report.held_out.chosen]
    people = list(mixture)
    if not people:
        axis.set_axis_off()
        return
    places = np.arange(len(people))[::-1]
    for number, (name, by_person) in enumerate(report.annotators.items()):
        shares = [alike / max(decided, 1) for alike, decided in (by_person[person] for person in people)]
        # Shift the dots, since equal shares would hide each other.
        shifted = places + 0.1 * ((len(report.annotators) - 1) / 2 - number)
        axis.plot(shares, shifted, marker="o", linestyle="none", alpha=0.8, label=name)
    between = report.people.others
    if between.decided:
        axis.axvline(between.alike / between.decided, color="black", linestyle=":", label="people with each other")
    axis.set_yticks(places, [f"{_short(name)} ({mixture[name][1]})" for name in people], fontsize=8)
    axis.set_title("agreement by annotator (decided labels)", fontsize=9)
    axis.legend(fontsize=7)


def _short(name: str) -> str:
    shown = one_line(name)
    return shown if len(shown) <= _MAX_NAME else f"{shown[:_MAX_NAME]} ..."
