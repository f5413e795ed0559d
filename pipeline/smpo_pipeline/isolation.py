"""Isolate the items that make a batch fail: retry it, bisect it, then run it without the items that fail alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from smpo_models.memory import is_out_of_memory, says_out_of_memory
from smpo_schemas.reject_kinds import RejectKind

Item = TypeVar("Item")
Result = TypeVar("Result")

FAILURES = (RuntimeError, MemoryError)
"""Exceptions that a model raises if a device or kernel library fails. Others are a user's mistake, or a bug that would
occur with every item."""

_TRIES = 2

PAUSES = (2.0, 10.0)
"""Seconds before the second and third try of an item that runs out of memory alone: another program may free some."""


@dataclass(frozen=True)
class Failure:
    """Stands for an item without a result."""

    reason: str


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The results of a batch, and its failures; together they cover all items.

    Attributes:
        results: results, each with the positions of its items in the batch.
        failed: reasons by position.
        largest_batch: size of the largest batch that succeeded, if the items only fail together; else None.
        out_of_memory: the error of an item of ``failed`` that runs out of memory alone, even after pauses; else None.
    """

    results: list[tuple[list[int], Result]]
    failed: dict[int, str]
    largest_batch: int | None = None
    out_of_memory: str | None = None


def run_isolated(run: Callable[[Sequence[Item]], Result], items: Sequence[Item], device: str) -> Outcome[Result]:
    """Run a batch, as a whole if possible.

    All items that do not fail alone are run again as one batch, so that results depend on which items fail, not on
    transient failures. If no item fails alone, the batch is too large for the device, and its halves are returned. An
    item that runs out of memory alone is tried again after pauses.

    Args:
        run: computes the result of some items.
        items: the batch.
        device: cpu or cuda. A process whose GPU stops responding exits, since only a new process can use it again.
    """
    result = _try(run, items, device)
    if not isinstance(result, Failure):
        return Outcome([(list(range(len(items))), result)], {})
    parts, errors = _bisect(run, items, device) if len(items) > 1 else ([], {0: result.reason})
    late, errors = _retry_after_pauses(run, items, errors, device)
    if not errors:
        # If memory came back in a pause, the batch may have been small enough.
        largest = None if late else max(len(positions) for positions, _ in parts)
        return Outcome(parts + late, {}, largest)
    failed = {position: _reason(error) for position, error in errors.items()}
    out_of_memory = next((error for error in errors.values() if says_out_of_memory(error)), None)
    rest = [position for position in range(len(items)) if position not in failed]
    if not rest:
        return Outcome([], failed, out_of_memory=out_of_memory)
    # The items may still fail together, or fail alone only now: the same again with what is left.
    outcome = run_isolated(run, [items[position] for position in rest], device)
    results = [([rest[index] for index in indices], result) for indices, result in outcome.results]
    failed |= {rest[index]: reason for index, reason in outcome.failed.items()}
    return Outcome(results, failed, outcome.largest_batch, out_of_memory or outcome.out_of_memory)


def run_alone(run: Callable[[Sequence[Item]], object], item: Item, device: str) -> None:
    """Run one item to see if it crashes the process; an error is ignored, since :func:`run_isolated` meets it again."""
    _try(run, [item], device)


def _reason(error: str) -> str:
    if says_out_of_memory(error):
        return f"{RejectKind.OUT_OF_MEMORY}: for it alone, and {len(PAUSES)} times after a pause: {error}"
    return f"{RejectKind.FAILS_ALONE}: {error}"


def _retry_after_pauses(
    run: Callable[[Sequence[Item]], Result], items: Sequence[Item], errors: dict[int, str], device: str
) -> tuple[list[tuple[list[int], Result]], dict[int, str]]:
    """Retry the items that ran out of memory alone; return their results, and the errors that remain."""
    late: list[tuple[list[int], Result]] = []
    remaining = dict(errors)
    for pause in PAUSES:
        waiting = [position for position, error in remaining.items() if says_out_of_memory(error)]
        if not waiting:
            break
        time.sleep(pause)
        for position in waiting:
            result = _try(run, [items[position]], device)
            if isinstance(result, Failure):
                remaining[position] = result.reason
            else:
                late.append(([position], result))
                del remaining[position]
    return late, remaining


def _bisect(
    run: Callable[[Sequence[Item]], Result], items: Sequence[Item], device: str
) -> tuple[list[tuple[list[int], Result]], dict[int, str]]:
    """Run halves, and halves of those that fail; return results by positions, and the errors of single items."""
    results: list[tuple[list[int], Result]] = []
    errors: dict[int, str] = {}
    failing = [list(range(len(items)))]
    while failing:
        positions = failing.pop()
        middle = len(positions) // 2
        for half in filter(None, (positions[:middle], positions[middle:])):
            result = _try(run, [items[position] for position in half], device)
            if not isinstance(result, Failure):
                results.append((half, result))
            elif len(half) == 1:
                errors[half[0]] = result.reason
            else:
                failing.append(half)
    return results, errors


def _try(run: Callable[[Sequence[Item]], Result], items: Sequence[Item], device: str) -> Result | Failure:
    """Run a batch, twice if it fails."""
    failure = Failure("")
    for _ in range(_TRIES):
        try:
            return run(items)
        except FAILURES as error:
            # Only the text: the error's traceback would keep the tensors of its frames in memory.
            failure = Failure(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        _exit_if_gpu_is_broken(device)
    return failure


def _exit_if_gpu_is_broken(device: str) -> None:
    if device == "cuda":
        try:
            torch.ones(1, device=device).item()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                os._exit(1)
