"""Processes of a run as threads, for parts that only sum and gather numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class FakeAccelerator:
    """What accelerate does for one of several threads."""

    device = torch.device("cpu")

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._slots, self._barrier = rank, slots, barrier

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._slots[self._rank] = tensor
        self._barrier.wait(timeout=30)
        gathered = torch.cat(self._slots)
        self._barrier.wait(timeout=30)
        return gathered

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return self.gather(tensor[None]).sum(0)


def in_processes(number: int, work: Callable[[Any, int], T]) -> list[T]:
    """The results of ``work(accelerator, rank)`` in each of several processes."""
    slots, barrier = [None] * number, threading.Barrier(number)
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda rank: work(FakeAccelerator(rank, slots, barrier), rank), range(number)))
