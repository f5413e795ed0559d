"""Reads thousands of hostile inputs and counts what becomes of them: ``python -m tests.fuzz`` (Linux).

Each input is made from its seed alone. It may be read, rejected with a reason, or refused with one line. Anything else
is a finding: another exception, a crash of the process, more than 5 seconds of CPU, more memory than the limit, a file
written or a process started. ``python -m tests.fuzz --kind files --seeds 17 18`` reads one again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

KINDS = {"images": 10_000, "files": 1000, "layouts": 1000}
"""Modules of ``tests/fuzzing``, and how many inputs of each a whole campaign reads."""

SECONDS = 5.0
"""CPU time of one input; an answer must come within three times that on the clock, since machines may be busy."""

PEAK_BYTES = {"images": 2 << 30, "files": 512 << 20, "layouts": 512 << 20}
"""Of one input; an image of the most pixels that are decoded is allowed 20 bytes a pixel."""


@dataclass
class Findings:
    """What became of the inputs of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    largest: tuple[int, int] = (0, -1)

    def note(self, kind: str, seed: int, report: dict[str, Any]) -> None:
        """Count one input."""
        self.outcomes[report["outcome"]] += 1
        self.slowest = max(self.slowest, (report["seconds"], seed))
        self.largest = max(self.largest, (report["peak"], seed))
        if report["problem"]:
            self.problems[seed] = report["problem"]
        elif report["peak"] > PEAK_BYTES[kind]:
            self.problems[seed] = f"{report['peak'] / 1e6:.0f} MB of memory"
        elif report["seconds"] > SECONDS:
            self.problems[seed] = f"{report['seconds']:.1f} s"
        if seed in self.problems:
            print(f"  {kind} seed {seed}: {self.problems[seed]}", flush=True)


def campaign(kind: str, first: int, stop: int) -> Findings:
    """Read the inputs of seeds ``first`` to ``stop`` (excluded) in a child, and in another after it dies."""
    findings = Findings()
    while first < stop:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz", "--serve", kind, str(first), str(stop)], stdout=subprocess.PIPE
        )
        try:
            running: int | None = None
            for report in _reports(child):
                if "outcome" in report:
                    findings.note(kind, report["seed"], report)
                    first, running = report["seed"] + 1, None
                else:
                    running = report["seed"]
        except TimeoutError:
            child.kill()
        status = child.wait()
        if first < stop:
            if running is None:
                raise RuntimeError(f"the reading process ended with status {status} before seed {first}")
            died = f"no answer after {3 * SECONDS:g} s" if status == -9 else f"the process died with status {status}"
            findings.outcomes["died"] += 1
            findings.problems[running] = died
            print(f"  {kind} seed {running}: {died}", flush=True)
            first = running + 1
    return findings


def _reports(child: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The child's lines; TimeoutError where an input takes too long (starting and making an input may take longer)."""
    assert child.stdout is not None
    buffer = b""
    limit = 120.0
    while True:
        ready, _, _ = select.select([child.stdout], [], [], limit)
        if not ready:
            raise TimeoutError
        part = os.read(child.stdout.fileno(), 1 << 16)
        if not part:
            return
        *lines, buffer = (buffer + part).split(b"\n")
        for line in lines:
            report = json.loads(line)
            limit = 120.0 if "outcome" in report else 3 * SECONDS
            yield report


def _serve(kind: str, first: int, stop: int) -> None:
    from tests.fuzzing import worker

    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # readers may print
    with suppress(BrokenPipeError):
        worker.serve(importlib.import_module(f"tests.fuzzing.{kind}"), range(first, stop), out)


def main() -> int:
    """Run a campaign, print what was found; the exit status is 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, help="one kind only")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "STOP"), help="default: a whole campaign")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve[0], *map(int, options.serve[1:]))
        return 0
    found = 0
    for kind in [options.kind] if options.kind else KINDS:
        start = time.monotonic()
        first, stop = options.seeds or (0, KINDS[kind])
        findings = campaign(kind, first, stop)
        counts = ", ".join(f"{count} {outcome}" for outcome, count in findings.outcomes.most_common())
        print(
            f"{kind}: {stop - first} inputs in {time.monotonic() - start:.0f} s: {counts}; "
            f"slowest {findings.slowest[0]:.2f} s (seed {findings.slowest[1]}), "
            f"largest {findings.largest[0] / 1e6:.0f} MB (seed {findings.largest[1]}); "
            f"{len(findings.problems)} findings"
        )
        found += len(findings.problems)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
