"""Run the checks in order, each with an alarm of its own, and write each result at once."""

from __future__ import annotations

import json
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from benchmarks.acceptance.device import Device, lines_of_gpu_alone

if TYPE_CHECKING:  # It imports all of the project.
    from benchmarks.acceptance.world import World

RESULTS_FILE, TABLE_FILE = "results.jsonl", "table.md"
BUDGET = 510.0
"""Seconds for all checks; a check's budget is a share of it."""

LEAST = 3.0
"""A check does not start with fewer seconds left."""


class OverrunError(BaseException):
    """A check exceeded its budget. No Exception: nothing on its way may take it for a failure of its own."""


class Report:
    """The result of one check.

    Attributes:
        values: numbers and words by name.
        criteria: of each its name, value, limit and verdict: ``pass``, ``FAIL`` or ``not judged``.
    """

    def __init__(self, device: Device) -> None:
        self._judges_rates = device.judges_rates
        self.values: dict[str, Any] = {}
        self.criteria: list[dict[str, Any]] = []

    def note(self, **values: object) -> None:
        """Report without a verdict."""
        self.values |= values

    def judge(
        self,
        name: str,
        value: float | None,
        *,
        most: float = math.inf,
        least: float = -math.inf,
        on_cpu: bool = True,
    ) -> None:
        """Judge a value by limits, which are allowed values.

        Args:
            name: of the criterion.
            value: None where this device or run cannot say it.
            most: upper limit.
            least: lower limit.
            on_cpu: whether the criterion makes sense on a CPU; rates, memory and CUDA's arithmetic do not.
        """
        limits = [f">= {least:g}"] * (least > -math.inf) + [f"<= {most:g}"] * (most < math.inf)
        judged = value is not None and (on_cpu or self._judges_rates)
        verdict = ("pass" if least <= value <= most else "FAIL") if judged else "not judged"
        shown = None if value is None else float(value)
        self.criteria.append({"name": name, "value": shown, "wanted": " and ".join(limits), "verdict": verdict})


@dataclass(frozen=True)
class Check:
    """One of the checks.

    Attributes:
        name: as the table calls it.
        work: does it.
        seconds: its budget, as a share of :data:`BUDGET`.
        optional: it starts only if what is left holds its budget and those of all checks after it that are not; it
            then has all that is left over.
    """

    name: str
    work: Callable[[World, Report], None]
    seconds: float
    optional: bool = False


def run_checks(checks: Sequence[Check], world: World, out: Path, budget: float, began: float) -> list[dict[str, Any]]:
    """Run them and write ``results.jsonl`` and ``table.md`` into ``out``, after each check.

    Args:
        checks: in order.
        world: what they share.
        out: an existing folder.
        budget: seconds for all of them, counted from ``began``.
        began: of ``time.monotonic``.

    Returns:
        The rows of ``results.jsonl``.
    """
    stretch, described = budget / BUDGET, world.describe()
    (out / RESULTS_FILE).write_text("", encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for position, check in enumerate(checks):
        left = budget - (time.monotonic() - began)
        spare = left - sum(each.seconds for each in checks[position + 1 :] if not each.optional) * stretch
        row: dict[str, Any] = {"check": position, "name": check.name}
        if check.optional and spare < check.seconds * stretch:
            row |= {"seconds": 0.0, "verdict": f"skipped: {max(0.0, spare):.0f} s are left for it"}
        elif left < LEAST:
            row |= {"seconds": 0.0, "verdict": "failed: the budget is used up"}
        else:
            row |= _run(check, world, spare if check.optional else min(left, check.seconds * stretch))
        rows.append(row)
        with (out / RESULTS_FILE).open("a", encoding="utf-8") as file:
            print(json.dumps(row, default=str), file=file)
        (out / TABLE_FILE).write_text("\n".join(table_of(rows, world, described)) + "\n", encoding="utf-8")
        print(f"[{time.monotonic() - began:5.0f} s] {check.name}: {row['verdict']}", flush=True)
    return rows


def _run(check: Check, world: World, seconds: float) -> dict[str, Any]:
    report, failure = Report(world.device), ""
    world.device.clean()
    began = time.monotonic()
    try:
        with _alarm(seconds):
            check.work(world, report)
    except OverrunError:
        failure = f"failed: longer than {seconds:.0f} s"
    except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a check raises, the next one goes on)
        traceback.print_exc()
        # Its frames hold tensors.
        failure = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    missed = [each["name"] for each in report.criteria if each["verdict"] == "FAIL"]
    world.device.clean()
    return {
        "seconds": round(time.monotonic() - began, 2),
        "verdict": failure or (f"FAIL: {', '.join(missed)}" if missed else "pass"),
        "criteria": report.criteria,
        "values": report.values,
    }


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise OverrunError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table_of(rows: Sequence[dict[str, Any]], world: World, described: Mapping[str, Any]) -> Iterator[str]:
    """Make ``table.md``."""
    yield from (f"{name}: {value}  " for name, value in described.items())
    yield ""
    yield "| # | check | seconds | verdict |"
    yield "| --- | --- | --- | --- |"
    yield from (f"| {row['check']} | {row['name']} | {row['seconds']:.1f} | {_cell(row['verdict'])} |" for row in rows)
    yield ""
    yield "| # | criterion | value | wanted | verdict |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows:
        for each in row.get("criteria", ()):
            value = "" if each["value"] is None else f"{each['value']:.4g}"
            yield f"| {row['check']} | {each['name']} | {value} | {each['wanted']} | {each['verdict']} |"
    yield ""
    yield "| # | measured | value |"
    yield "| --- | --- | --- |"
    for row in rows:
        for name, value in row.get("values", {}).items():
            yield f"| {row['check']} | {name.replace('_', ' ')} | {_cell(value)} |"
    if not world.device.judges_rates:
        yield ""
        yield "Not judged on this device: what the table says so of. Lines that only a GPU runs:"
        yield ""
        yield from (f"- {line}" for line in lines_of_gpu_alone())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "/").replace("\n", " ")
