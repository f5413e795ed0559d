"""What was begun and never ended: a worker that dies can say nothing, so that somebody else keeps count.

Ray starts what a dead worker was doing again, without limit. That is right for a node that was taken away, and wrong
for a pair that kills whoever touches it. The ledger tells one from the other: it is told before a piece of work and
after it, and what was begun several times without an end is what kills.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Protocol

import ray


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


class Counts:
    """A ledger within one process."""

    def __init__(self) -> None:
        self._begun: dict[Hashable, int] = defaultdict(int)
        self._acquitted: set[Hashable] = set()

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
