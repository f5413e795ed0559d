"""Find and reject the items that crash workers.

Ray restarts the work of a dead worker without limit. That is right for a lost node, and wrong for a pair that crashes
every worker. After some crashes of a piece of work (:class:`WorkLog` counts them) its items are tried one by one, and
an item that crashes workers alone is rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

from smpo_common.errors import UserError
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.reject_kinds import RejectKind

Item = TypeVar("Item")

RETRY_ONE_BY_ONE_AFTER = 2
"""Crashes after which the items of a piece of work are tried one by one."""

REJECT_AFTER = 3
"""Crashes alone after which an item is rejected: a node may also be lost while a harmless item is tried."""

STOP_AFTER = 6
"""Crashes after which a piece of work stops the job, although none of its items crashes alone."""


class CrashGuard:
    """Logs the work of one worker process and all its threads."""

    def __init__(self, work_log: WorkLog) -> None:
        self._log = work_log
        self._changed, self._working = Condition(), 0

    @contextmanager
    def working(self, key: Hashable, description: str) -> Iterator[None]:
        """Log a piece of work, so that a crash within is counted.

        Args:
            key: of the piece.
            description: of the piece, and what to do if it crashes workers.

        Raises:
            UserError: it has crashed too many workers already.
        """
        with self._changed:
            self._working += 1
        try:
            if self._log.begin(key) >= STOP_AFTER:
                raise UserError(f"{STOP_AFTER} workers died while {description}")
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
        """Find the items that crash workers, if their piece of work has done so: reasons by position.

        Each item is run alone, with no other work in this process. The result is dropped: results come from whole
        batches, so that they are the same with and without a crash.

        Args:
            key: of the piece.
            run: works on one item (:func:`smpo_pipeline.isolation.run_alone`).
            items: in an order that is the same each time the piece is begun.
        """
        if self._log.crashes(key) < RETRY_ONE_BY_ONE_AFTER:
            return {}
        reasons: dict[int, str] = {}
        with self._changed:
            self._changed.wait_for(lambda: not self._working)
            for position, item in enumerate(items):
                alone = (key, position)
                if self._log.crashes(alone) >= REJECT_AFTER:
                    reasons[position] = f"{RejectKind.CRASHES_WORKER}: {REJECT_AFTER} workers died while processing it"
                elif not self._log.is_harmless(alone):
                    # A crash here ends this process; the next one finds it counted.
                    self._log.begin(alone)
                    run(item)
                    self._log.mark_harmless(alone)
        return reasons
