"""Work that crashes workers: found by counting what was begun and never ended.

A worker that dies can report nothing, and Ray restarts what it was doing without limit. That is right for a node that
was taken away, and wrong for a pair that crashes every worker. So each piece of work is counted before and after it, by
an actor that outlives the workers. After some crashes a piece's items are tried one by one. An item that crashes
workers alone is rejected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any, TypeVar, cast

import ray

from smpo_common.errors import UserError

Item = TypeVar("Item")

RETRY_ONE_BY_ONE_AFTER = 2
"""Crashes after which the items of a piece of work are tried one by one."""

REJECT_AFTER = 3
"""Crashes alone after which an item is rejected: a node may also be lost while a harmless item is tried."""

STOP_AFTER = 6
"""Crashes after which a piece of work, of which no item crashes alone, stops the job."""


class WorkLog:
    """What a job's workers have begun and not ended, by key, and how many pairs of their units are done."""

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
        """Take back the latest `begin`: an error that was seen is no crash."""
        self._unended[key] -= 1

    def crashes(self, key: Hashable) -> int:
        """How often a piece of work was begun and not ended."""
        return self._unended.get(key, 0)

    def mark_harmless(self, key: Hashable) -> None:
        """Remember that an item was tried alone and ended."""
        self.end(key)
        self._harmless.add(key)

    def is_harmless(self, key: Hashable) -> bool:
        """Whether an item was."""
        return key in self._harmless

    def report(self, unit: int, part: Hashable, pairs: float) -> None:
        """Set the number of pairs that are done of a part of a unit."""
        self._done[unit][part] = pairs

    def retire(self, unit: int) -> None:
        """Drop the reports of a unit that is committed."""
        self._done.pop(unit, None)

    def under_way(self) -> float:
        """Pairs that are done of units that are not committed."""
        return sum(sum(parts.values()) for parts in self._done.values())


def shared_work_log() -> WorkLog:
    """Start the log of all workers of a connected job, in an actor that takes no slot; the driver must keep it.

    If the actor's node is lost, Ray restarts it empty: what crashes workers is then found a few crashes later.
    """
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(WorkLog)
    return cast("WorkLog", _Remote(actor.remote()))


class _Remote:
    """Calls a log that is an actor, and waits for its answer where there is one."""

    _ANSWERED = ("begin", "crashes", "is_harmless", "under_way")

    def __init__(self, actor: Any) -> None:  # noqa: ANN401  (Ray's handles have no type)
        self._actor = actor

    def __reduce__(self) -> tuple[type[_Remote], tuple[Any]]:
        return _Remote, (self._actor,)  # __getattr__ must not be asked before there is an actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._actor, name).remote
        return (lambda *args: ray.get(call(*args))) if name in self._ANSWERED else call


class CrashGuard:
    """Logs the work of one worker process, whatever its number of threads."""

    def __init__(self, work_log: WorkLog) -> None:
        self._log = work_log
        self._changed, self._working = Condition(), 0

    @contextmanager
    def working(self, key: Hashable, what: str) -> Iterator[None]:
        """Log a piece of work, so that a crash within is counted.

        Args:
            key: of the piece.
            what: describes the piece, and what to do if it crashes workers.

        Raises:
            UserError: it has crashed too many workers already.
        """
        with self._changed:
            self._working += 1
        try:
            if self._log.begin(key) >= STOP_AFTER:
                raise UserError(f"{STOP_AFTER} workers died, each while {what}")
            yield
        except BaseException:
            self._log.cancel(key)
            raise
        else:
            self._log.end(key)
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def crashing_items(self, key: Hashable, run: Callable[[Item], object], items: Iterable[Item]) -> dict[int, str]:
        """Find the items of a piece that crash workers, once the piece itself has: reasons by position.

        Each item is run alone, with no other work in this process, and its result is dropped: the results of harmless
        items come from whole batches, as if there had been no crash.

        Args:
            key: of the piece.
            run: works on one item (:func:`smpo_pipeline.isolation.run_alone`).
            items: in order, the same whenever the piece is begun.
        """
        if self._log.crashes(key) < RETRY_ONE_BY_ONE_AFTER:
            return {}
        found: dict[int, str] = {}
        with self._changed:
            self._changed.wait_for(lambda: not self._working)
            for position, item in enumerate(items):
                alone = (key, position)
                if self._log.crashes(alone) >= REJECT_AFTER:
                    found[position] = f"crashes its worker: {REJECT_AFTER} workers died while they processed it alone"
                elif not self._log.is_harmless(alone):
                    self._log.begin(alone)
                    run(item)
                    self._log.mark_harmless(alone)
        return found
