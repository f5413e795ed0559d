"""The batches of a model actor: as large as memory allows, and timed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_pipeline.batch_size import choose_batch_size
from smpo_pipeline.isolation import Outcome, run_isolated
from smpo_pipeline.jobs.record.batch_sizes import record_batch_size

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches:
    """Runs an actor's batches, and finds how large they can be."""

    def __init__(self, size: int | None, device: str, out: AnyPath, noun: str) -> None:
        """Take the settings.

        Args:
            size: items of a batch; None: to be chosen.
            device: cpu or cuda.
            out: folder of the job, where changes of the size are recorded.
            noun: what a single item is, for errors.
        """
        self._size, self._device, self._out, self._noun = size, device, out, noun
        self.start_unit()

    @property
    def chosen(self) -> bool:
        """Whether the size is known."""
        return self._size is not None

    @property
    def size(self) -> int:
        """Items of a batch; it may become smaller with each one."""
        return self._size or 1

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds within batches since :meth:`start_unit`, and in total."""
        return self._busy, time.monotonic() - self._started

    def start_unit(self) -> None:
        """Set the seconds to 0."""
        self._busy, self._started = 0.0, time.monotonic()

    def choose_size(self, try_batch: Callable[[int], object], most: int) -> None:
        """Choose the size; see :func:`smpo_pipeline.batch_size.choose_batch_size`."""
        self._set_size(choose_batch_size(try_batch, most, self._device))

    def run(self, run: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> Outcome[Result]:
        """Run a batch, in parts if it must be; see :func:`smpo_pipeline.isolation.run_isolated`.

        Raises:
            UserError: memory does not hold a single item.
        """
        start = time.monotonic()
        outcome = run_isolated(run, items, self._device)
        self._busy += time.monotonic() - start
        if outcome.out_of_memory:
            # All items need about the same memory, so that the others would fail too: do not reject this one.
            raise UserError(
                f"too little memory for a single {self._noun} on {socket.gethostname()}, also after pauses: "
                f"{outcome.out_of_memory}; is another program using it? Committed units are kept, run the same command "
                "again to resume"
            )
        if outcome.largest_batch:
            self._set_size(outcome.largest_batch)
        return outcome

    def _set_size(self, size: int) -> None:
        self._size = size
        record_batch_size(self._out, size)
