"""``smpo-pipeline status``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table

from smpo_common.options import Flag, Options
from smpo_common.store_path import parse_path

if TYPE_CHECKING:
    from smpo_pipeline.jobs.record.status import Status

_REASONS = 5


class StatusOptions(Options):
    """The settings of ``status``."""

    out: Annotated[str, Flag(positional=True, metavar="DIR|URL")]
    """What `score` or `invert` has as --out."""


def status(options: StatusOptions) -> None:
    """Say how far a run of score or invert is: units, pairs, rejects and why, rate, remaining time.

    Reads what the run has committed, from any machine that sees it, and changes nothing.
    """
    from smpo_pipeline.jobs.record.status import read_status  # noqa: PLC0415  (keeps --help quick)

    found = read_status(parse_path(options.out))
    console = Console(markup=False)
    console.print(_table(found, time.time()))
    if not found.finished and not found.holder:
        console.print("Nobody is at it. The same command, given again, goes on where this stands.")


def _table(found: Status, now: float) -> Table:
    table = Table(show_header=False, box=None)
    what = f"{found.job} ({', '.join(found.rewards)})" if found.rewards else found.job
    table.add_row(what, "finished" if found.finished else "not finished")
    if found.holder:
        table.add_row("at it", found.holder)
    table.add_row("units", f"{found.units_done:,} of {found.units:,}")
    table.add_row("pairs", f"{found.pairs_done:,} of {found.pairs_in:,} ({found.pairs_done / found.pairs_in:.1%})")
    share = f" ({found.rejected / found.pairs_done:.2%})" if found.pairs_done else ""
    table.add_row("rejected", f"{found.rejected:,}{share}")
    for reason, count in list(found.reasons.items())[:_REASONS]:
        table.add_row("", f"{count:,} {reason}")
    if found.rate is not None and found.remaining is not None:
        table.add_row("rate", f"{found.rate:.3g} pairs/s since the run was begun, or begun again")
        if found.model_share is not None:
            table.add_row("model at work", f"{found.model_share:.0%} of the actors' time")
        table.add_row("remaining", duration(found.remaining))
    if found.last_commit is not None:
        table.add_row("last unit", f"{duration(max(0, now - found.last_commit))} ago")
    return table


def duration(seconds: float) -> str:
    """Two units of time at the most, as in ``3 h 5 min``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{number} {unit}" for number, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if number]
    return " ".join(parts[:2])
