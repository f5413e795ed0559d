"""What was begun and never ended: a worker that dies can say nothing, so that somebody else keeps count.

Ray starts what a dead worker was doing again, without limit. That is right for a node that was taken away, and wrong
for a pair that kills whoever touches it. The ledger tells one from the other: it is told before a piece of work and
after it, and what was begun several times without an end is what kills.

It also adds up how far the units are that workers are at, for the progress that is shown.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Protocol

import ray

_REPORT_SECONDS = 1.0


class Ledger(Protocol):
    """Pieces of work, each under a key of its own."""

    def begin(self, key: Hashable) -> int:
        """A piece of work begins; returns how often it was begun before without an end."""

    def end(self, key: Hashable) -> None:
        """It ended well: this is forgotten, with all that was counted."""

    def retract(self, key: Hashable) -> None:
        """It ended with an error that was seen, and may be tried again: of what was counted, only this is forgotten."""

    def deaths(self, key: Hashable) -> int:
        """How often it was begun without an end."""

    def acquit(self, key: Hashable) -> None:
        """It was tried alone, and ended: this is remembered."""

    def acquitted(self, key: Hashable) -> bool:
        """Whether it was."""

    def report(self, unit: int, part: Hashable, pairs: float) -> None:
        """So many pairs of a part of a unit are done; each part says its latest number."""


class Reporter:
    """A worker's reports, one a second at the most: batches may be faster."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` is in seconds."""
        self._ledger, self._clock, self._next = ledger, clock, clock() + _REPORT_SECONDS

    def report(self, unit: int, part: Hashable, pairs: float) -> None:
        """See :meth:`Ledger.report`."""
        if self._clock() >= self._next:
            self._next = self._clock() + _REPORT_SECONDS
            self._ledger.report(unit, part, pairs)


class Counts:
    """A ledger within one process."""

    def __init__(self) -> None:
        self._begun: dict[Hashable, int] = defaultdict(int)
        self._acquitted: set[Hashable] = set()
        self._under_way: dict[int, dict[Hashable, float]] = defaultdict(dict)

    def begin(self, key: Hashable) -> int:
        """See :class:`Ledger`, as all of these."""
        self._begun[key] += 1
        return self._begun[key] - 1

    def end(self, key: Hashable) -> None:  # noqa: D102
        self._begun.pop(key, None)

    def retract(self, key: Hashable) -> None:  # noqa: D102
        self._begun[key] -= 1

    def deaths(self, key: Hashable) -> int:  # noqa: D102
        return self._begun.get(key, 0)

    def acquit(self, key: Hashable) -> None:  # noqa: D102
        self._acquitted.add(key)

    def acquitted(self, key: Hashable) -> bool:  # noqa: D102
        return key in self._acquitted

    def report(self, unit: int, part: Hashable, pairs: float) -> None:  # noqa: D102
        self._under_way[unit][part] = pairs

    def retire(self, unit: int) -> None:
        """A unit is committed: what was reported of it is forgotten."""
        self._under_way.pop(unit, None)

    def under_way(self) -> float:
        """Pairs that are done of units that are not committed."""
        return sum(sum(parts.values()) for parts in self._under_way.values())


class SharedLedger:
    """A ledger of all workers of a job, in an actor that takes no slot.

    Where the node goes that it is on, Ray starts it anew and counting begins again: what kills is then found a few
    deaths later.
    """

    def __init__(self) -> None:
        """To be made, and kept, on the driver of a connected job."""
        self._counts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Counts).remote()

    def begin(self, key: Hashable) -> int:
        """See :class:`Ledger`, as all of these."""
        return int(ray.get(self._counts.begin.remote(key)))

    def end(self, key: Hashable) -> None:  # noqa: D102
        self._counts.end.remote(key)

    def retract(self, key: Hashable) -> None:  # noqa: D102
        self._counts.retract.remote(key)

    def deaths(self, key: Hashable) -> int:  # noqa: D102
        return int(ray.get(self._counts.deaths.remote(key)))

    def acquit(self, key: Hashable) -> None:  # noqa: D102
        self._counts.acquit.remote(key)

    def acquitted(self, key: Hashable) -> bool:  # noqa: D102
        return bool(ray.get(self._counts.acquitted.remote(key)))

    def report(self, unit: int, part: Hashable, pairs: float) -> None:  # noqa: D102
        self._counts.report.remote(unit, part, pairs)

    def retire(self, unit: int) -> None:
        """See :class:`Counts`, as the next."""
        self._counts.retire.remote(unit)

    def under_way(self) -> float:  # noqa: D102
        return float(ray.get(self._counts.under_way.remote()))
