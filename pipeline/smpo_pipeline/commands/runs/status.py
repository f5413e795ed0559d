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
"""Most kinds of rejects in the table."""


class StatusOptions(Options):
    """The flags of ``status``."""

    out: Annotated[str, Flag(positional=True, metavar="DIR|URL")]
    """The --out of `score`, `invert`, `generate` or `steps`."""


def status(options: StatusOptions) -> None:
    """Show the progress of a run of score, invert, generate or steps: units, rows, rejects, rate, remaining time.

    Works from any machine that can read the directory, and changes nothing.

    Examples:
        smpo-pipeline status shards
    """
    from smpo_pipeline.jobs.record.status import read_status  # noqa: PLC0415  (keeps --help quick)

    progress = read_status(parse_path(options.out))
    console = Console(markup=False)
    console.print(_table(progress, time.time()))
    if not progress.finished and not progress.holder:
        console.print("Not running. Run the same command again to resume.")


def _table(status: Status, now: float) -> Table:
    table = Table(show_header=False, box=None)
    job = f"{status.job} ({', '.join(status.rewards)})" if status.rewards else status.job
    table.add_row(job, "finished" if status.finished else "not finished")
    if status.holder:
        table.add_row("held by", status.holder)
    if status.prompts:
        stored, prompts = status.prompts
        table.add_row("prompts encoded", f"{stored:,} of {prompts:,}")
    table.add_row("units", f"{status.units_done:,} of {status.units:,}")
    noun = "prompts" if status.job == "generate" else "pairs"
    table.add_row(noun, f"{status.pairs_done:,} of {status.pairs_in:,} ({status.pairs_done / status.pairs_in:.1%})")
    share = f" ({status.rejected / status.pairs_done:.2%})" if status.pairs_done else ""
    table.add_row("rejected", f"{status.rejected:,}{share}")
    for reason, count in list(status.reasons.items())[:_REASONS]:
        table.add_row("", f"{count:,} {reason}")
    if status.rate is not None and status.remaining is not None:
        table.add_row("rate", f"{status.rate:.3g} {noun}/s since the last start")
        if status.model_share is not None:
            table.add_row("model", f"{status.model_share:.0%} of the actors' time")
        table.add_row("remaining", duration(status.remaining))
    if status.last_commit is not None:
        table.add_row("last unit", f"{duration(max(0, now - status.last_commit))} ago")
    return table


def duration(seconds: float) -> str:
    """Format a duration with at most two units, for example ``3 h 5 min``."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{number} {unit}" for number, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if number]
    return " ".join(parts[:2])
