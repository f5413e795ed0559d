"""Down to the item that fails: a batch that raises is tried again, bisected, and made without those that fail alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")

FAILURES = (RuntimeError, MemoryError)
"""What a model raises where a device or a library of kernels fails. Anything else is a user's mistake, or a bug that
would fail with every item."""

_TRIES = 2


@dataclass(frozen=True)
class Outcome(Generic[Made]):
    """What became of a batch.

    Attributes:
        made: what was made, with the positions in the batch that it is of; together with ``failed``, all of them.
        failed: the others, with reasons.
    """

    made: list[tuple[list[int], Made]]
    failed: dict[int, str]


def make(run: Callable[[Sequence[Item]], Made], items: Sequence[Item], device: str) -> Outcome[Made]:
    """Run a batch, as a whole if at all possible.

    What is left after those that fail alone were found is made as one batch, so that the result depends on which
    items fail, never on what failed once. Where no item fails alone but all of them do together (too large for the
    device), halves are made instead.

    Args:
        run: makes something of some items.
        items: the batch.
        device: that it computes on; a process whose GPU does not answer any more ends itself, since only a new one
            can use it again.
    """
    made = _try(run, items, device)
    if not isinstance(made, str):
        return Outcome([(list(range(len(items))), made)], {})
    if len(items) == 1:
        return Outcome([], {0: f"fails alone: {made}"})
    failed = _failing_alone(run, items, device)
    rest = [position for position in range(len(items)) if position not in failed]
    groups = [rest] if failed else [rest[: len(rest) // 2], rest[len(rest) // 2 :]]
    outcome: Outcome[Made] = Outcome([], failed)
    for group in groups:
        if group:
            part = make(run, [items[position] for position in group], device)
            outcome.made.extend(([group[index] for index in indices], each) for indices, each in part.made)
            outcome.failed.update({group[index]: reason for index, reason in part.failed.items()})
    return outcome


def _failing_alone(run: Callable[[Sequence[Item]], Made], items: Sequence[Item], device: str) -> dict[int, str]:
    """Positions and reasons of the items that fail on their own; halves that pass are not looked into."""
    found: dict[int, str] = {}
    left = [list(range(len(items)))]
    while left:
        positions = left.pop()
        middle = len(positions) // 2
        for half in filter(None, (positions[:middle], positions[middle:])):
            made = _try(run, [items[position] for position in half], device)
            if isinstance(made, str):
                if len(half) == 1:
                    found[half[0]] = f"fails alone: {made}"
                else:
                    left.append(half)
    return found


def _try(run: Callable[[Sequence[Item]], Made], items: Sequence[Item], device: str) -> Made | str:
    """What was made, or the error, which must not be kept: it holds the tensors of the frames that it passed."""
    said = ""
    for _ in range(_TRIES):
        try:
            return run(items)
        except FAILURES as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        _leave_broken_gpu(device)
    return said


def _leave_broken_gpu(device: str) -> None:
    if device == "cuda":
        try:
            torch.ones(1, device=device).item()
        except RuntimeError:
            os._exit(1)
