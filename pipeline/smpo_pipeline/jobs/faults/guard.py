"""A worker's work under the eyes of the ledger: what kills workers is found, and left out or stopped at."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

from smpo_common.errors import UserError
from smpo_pipeline.jobs.faults.ledger import Ledger

Item = TypeVar("Item")

SUSPECTED = 2
"""Deaths after which the items of a piece of work are tried one by one."""

CONVICTED = 3
"""Deaths alone after which an item is left out: nodes may go while it is innocently tried."""

GIVEN_UP = 6
"""Deaths after which a piece of work, all of whose items are innocent, stops the job."""


class Guard:
    """Of one worker process, whatever its number of threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._door, self._inside = Condition(), 0

    @contextmanager
    def working(self, key: Hashable, what: str) -> Iterator[None]:
        """Work on the piece that ``key`` stands for; whoever dies inside is counted.

        Args:
            key: the piece.
            what: the piece in words, and what to do if it kills.

        Raises:
            UserError: it has killed too many workers already.
        """
        with self._door:
            self._inside += 1
        try:
            if self._ledger.begin(key) >= GIVEN_UP:
                raise UserError(f"{GIVEN_UP} workers died, each while {what}")
            yield
        except BaseException:
            self._ledger.retract(key)
            raise
        else:
            self._ledger.end(key)
        finally:
            with self._door:
                self._inside -= 1
                self._door.notify_all()

    def killers(self, key: Hashable, run: Callable[[Item], object], items: Iterable[Item]) -> dict[int, str]:
        """Which of a piece's items kill, by position, with the reason; looks only at a piece that is suspected.

        Each is run alone, nobody else in this process working, and the result dropped: what the innocent ones give
        comes from whole batches, as if nothing had happened.

        Args:
            key: the piece.
            run: works on one item (:func:`smpo_pipeline.isolation.run_alone`).
            items: in order, the same whenever the piece is begun.
        """
        if self._ledger.deaths(key) < SUSPECTED:
            return {}
        found: dict[int, str] = {}
        with self._door:
            self._door.wait_for(lambda: not self._inside)
            for position, item in enumerate(items):
                alone = (key, position)
                if self._ledger.deaths(alone) >= CONVICTED:
                    found[position] = f"kills its worker: {CONVICTED} died of it alone, without a word"
                elif not self._ledger.acquitted(alone):
                    self._ledger.begin(alone)
                    run(item)
                    self._ledger.end(alone)
                    self._ledger.acquit(alone)
        return found
