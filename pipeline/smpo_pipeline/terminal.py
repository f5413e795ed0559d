"""Small tables and bars for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from smpo_common.errors import one_line

_BAR_WIDTH = 28
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
QUANTILE_NAMES = ("5 %", "25 %", "median", "75 %", "95 %")


def make_table(title: str, columns: Sequence[str], text_columns: int = 1) -> Table:
    """Make a table whose first ``text_columns`` are left-aligned, the others right-aligned."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        if number < text_columns:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """Make a table of names and values, without a header."""
    table = Table(title=title, box=None, show_header=False, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, one_line(value))
    table.add_row()
    return table


def bar(share: float) -> str:
    """Draw a bar of ``share`` (0 to 1) of the full width, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * _BAR_WIDTH * 8)
    return (_EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def histogram(title: str, values: np.ndarray, edges: Sequence[float], digits: int = 0) -> Table:
    """Count ``values`` between ``edges`` (the last bin is closed), with bars relative to the fullest bin."""
    counts, _ = np.histogram(values, edges)
    table = make_table(title, ("from .. to", "", "count", "share"), text_columns=2)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        cells = (f"{low:.{digits}f} .. {high:.{digits}f}", bar(count / max(1, counts.max())), f"{count}")
        table.add_row(*cells, percent(count, len(values)))
    return table


def counted(counts: Mapping[str, int], most: int = 8) -> str:
    """Format counts as ``a (12), b (3)``, most frequent first; all but the first ``most`` are summed up."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{name} ({count})" for name, count in ordered[:most]]
    if len(ordered) > most:
        words.append(f"{len(ordered) - most} others ({sum(count for _, count in ordered[most:])})")
    return ", ".join(words) or "none"


def print_next(console: Console, *command: object) -> None:
    """Print the next command, quoted for a shell, with names in capitals for what the user has to fill in."""
    text = f"next: {shlex.join(map(str, command))}"
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def percent(part: float, whole: float) -> str:
    """Format ``12.5 %``, or a dash if ``whole`` is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def quantile_cells(values: np.ndarray) -> list[str]:
    """Format the quantiles of :data:`QUANTILE_NAMES` with three digits; dashes if there are no values."""
    if not len(values):
        return ["-"] * len(_QUANTILES)
    return [f"{value:.3g}" for value in np.quantile(values, _QUANTILES)]


def format_bytes(count: float) -> str:
    """Format a number of bytes with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:  # noqa: PLR2004
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
