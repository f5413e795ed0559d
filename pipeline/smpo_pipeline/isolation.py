"""Down to the item that fails: a batch that raises is tried again, bisected, and made without those that fail alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from smpo_models.memory import is_out_of_memory, says_out_of_memory

Item = TypeVar("Item")
Made = TypeVar("Made")

FAILURES = (RuntimeError, MemoryError)
"""What a model raises where a device or a library of kernels fails. Anything else is a user's mistake, or a bug that
would fail with every item."""

_TRIES = 2

PAUSES = (2.0, 10.0)
"""Seconds to wait before the next tries of an item that found too little memory alone: others may have taken it."""


@dataclass(frozen=True)
class Failure:
    """Why an item has no result."""

    reason: str


@dataclass(frozen=True)
class Outcome(Generic[Made]):
    """What became of a batch.

    Attributes:
        made: what was made, with the positions in the batch that it is of; together with ``failed``, all of them.
        failed: the others, with reasons.
        fits: the most items that were made at once, where more failed but none of them alone; else None.
        short: what was said where memory did not hold an item of ``failed`` alone, after pauses neither; else None.
    """

    made: list[tuple[list[int], Made]]
    failed: dict[int, str]
    fits: int | None = None
    short: str | None = None


def make(run: Callable[[Sequence[Item]], Made], items: Sequence[Item], device: str) -> Outcome[Made]:
    """Run a batch, as a whole if at all possible.

    What is left after those that fail alone were found is made as one batch, so that the result depends on which
    items fail, never on what failed once. Where no item fails alone but all of them do together (too large for the
    device), halves are made instead. An item for which memory is too small alone is tried again after pauses.

    Args:
        run: makes something of some items.
        items: the batch.
        device: that it computes on; a process whose GPU does not answer any more ends itself, since only a new one
            can use it again.
    """
    made = _try(run, items, device)
    if not isinstance(made, Failure):
        return Outcome([(list(range(len(items))), made)], {})
    parts, said = _bisect(run, items, device) if len(items) > 1 else ([], {0: made.reason})
    late, said = _after_pauses(run, items, said, device)
    if not said:
        # Where memory came back, the batch may not have been too large.
        fits = None if late else max(len(positions) for positions, _ in parts)
        return Outcome(parts + late, {}, fits)
    failed = {position: _reason(why) for position, why in said.items()}
    short = next((why for why in said.values() if says_out_of_memory(why)), None)
    rest = [position for position in range(len(items)) if position not in failed]
    if not rest:
        return Outcome([], failed, short=short)
    of_rest = make(run, [items[position] for position in rest], device)
    parts = [([rest[index] for index in indices], each) for indices, each in of_rest.made]
    failed |= {rest[index]: why for index, why in of_rest.failed.items()}
    return Outcome(parts, failed, of_rest.fits, short or of_rest.short)


def run_alone(run: Callable[[Sequence[Item]], object], item: Item, device: str) -> None:
    """Run one item for what it does to this process; a mere failure is met again, and dealt with, by :func:`make`."""
    _try(run, [item], device)


def _reason(said: str) -> str:
    if says_out_of_memory(said):
        return f"too little memory: for it alone, and {len(PAUSES)} times after a pause: {said}"
    return f"fails alone: {said}"


def _after_pauses(
    run: Callable[[Sequence[Item]], Made], items: Sequence[Item], said: dict[int, str], device: str
) -> tuple[list[tuple[list[int], Made]], dict[int, str]]:
    """What is made of those items that memory alone failed, and what is said of the items that still fail."""
    late: list[tuple[list[int], Made]] = []
    still = dict(said)
    for pause in PAUSES:
        waiting = [position for position, why in still.items() if says_out_of_memory(why)]
        if not waiting:
            break
        time.sleep(pause)
        for position in waiting:
            made = _try(run, [items[position]], device)
            if isinstance(made, Failure):
                still[position] = made.reason
            else:
                late.append(([position], made))
                del still[position]
    return late, still


def _bisect(
    run: Callable[[Sequence[Item]], Made], items: Sequence[Item], device: str
) -> tuple[list[tuple[list[int], Made]], dict[int, str]]:
    """Halves, and halves of what fails: what was made of which positions, and what is said of those that fail alone."""
    parts: list[tuple[list[int], Made]] = []
    said: dict[int, str] = {}
    left = [list(range(len(items)))]
    while left:
        positions = left.pop()
        middle = len(positions) // 2
        for half in filter(None, (positions[:middle], positions[middle:])):
            made = _try(run, [items[position] for position in half], device)
            if not isinstance(made, Failure):
                parts.append((half, made))
            elif len(half) == 1:
                said[half[0]] = made.reason
            else:
                left.append(half)
    return parts, said


def _try(run: Callable[[Sequence[Item]], Made], items: Sequence[Item], device: str) -> Made | Failure:
    """Run a batch. Of an error only the text is kept: its traceback would hold the tensors of its frames."""
    failure = Failure("")
    for _ in range(_TRIES):
        try:
            return run(items)
        except FAILURES as error:
            failure = Failure(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        _leave_broken_gpu(device)
    return failure


def _leave_broken_gpu(device: str) -> None:
    if device == "cuda":
        try:
            torch.ones(1, device=device).item()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                os._exit(1)
