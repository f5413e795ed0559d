"""The shared log of a job's workers: work begun and not ended, to find crashes, and pairs done, for the progress bar.

A worker that dies can report nothing. So each piece of work is counted before and after it, in an actor that outlives
the workers: what was begun more often than ended has crashed (:mod:`smpo_pipeline.jobs.faults.crashes`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, cast

import ray


class WorkLog:
    """Crashes by piece of work, and progress by unit, of a running job. In memory: a new command starts from zero."""

    def __init__(self) -> None:
        self._unended: dict[Hashable, int] = defaultdict(int)
        self._harmless: set[Hashable] = set()
        self._done: dict[int, dict[Hashable, float]] = defaultdict(dict)

    def begin(self, key: Hashable) -> int:
        """Count a piece of work as begun; return its crashes so far."""
        self._unended[key] += 1
        return self._unended[key] - 1

    def end(self, key: Hashable) -> None:
        """Forget a piece of work that ended well, with its crashes."""
        self._unended.pop(key, None)

    def cancel(self, key: Hashable) -> None:
        """Take back the latest `begin`: a reported error is not a crash."""
        self._unended[key] -= 1

    def crashes(self, key: Hashable) -> int:
        """Count how often a piece of work was begun and not ended."""
        return self._unended.get(key, 0)

    def mark_harmless(self, key: Hashable) -> None:
        """Remember that an item was tried alone and did not crash its worker."""
        self.end(key)
        self._harmless.add(key)

    def is_harmless(self, key: Hashable) -> bool:
        """Whether an item was marked harmless."""
        return key in self._harmless

    def report(self, unit: int, part: Hashable, pairs: float) -> None:
        """Set the number of pairs that are done in one part of a unit."""
        self._done[unit][part] = pairs

    def retire(self, unit: int) -> None:
        """Drop the reports of a committed unit."""
        self._done.pop(unit, None)

    def pairs_in_progress(self) -> float:
        """Return the number of pairs done in units that are not committed yet."""
        return sum(sum(parts.values()) for parts in self._done.values())


def shared_work_log() -> WorkLog:
    """Start the log of a connected job, in an actor that takes no CPU slot; it ends with the driver's last reference.

    If the actor's node is lost, Ray restarts it empty: crashes are then counted from zero again.
    """
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(WorkLog)
    return cast("WorkLog", _Remote(actor.remote()))


class _Remote:
    """Forwards calls to a log in an actor; waits only for methods that return something."""

    _ANSWERED = ("begin", "crashes", "is_harmless", "pairs_in_progress")

    def __init__(self, actor: Any) -> None:  # noqa: ANN401  (Ray's handles have no type)
        self._actor = actor

    def __reduce__(self) -> tuple[type[_Remote], tuple[Any]]:
        return _Remote, (self._actor,)  # unpickling by default would ask __getattr__ before _actor exists

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._actor, name).remote
        return (lambda *args: ray.get(call(*args))) if name in self._ANSWERED else call
