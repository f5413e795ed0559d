"""The clock of the measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def now() -> float:
    """Current time in seconds, after waiting for the GPU, whose calls return before they are done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds of each step by part; "the rest" is what no part covers."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step."""
        parts: dict[str, float] = {}
        self.steps.append(parts)
        began = now()
        yield
        parts["the rest"] = now() - began - sum(parts.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part of the current step."""
        began = now()
        yield
        self.steps[-1][name] = self.steps[-1].get(name, 0.0) + now() - began

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function, to measure its calls as a part."""

        def call(*arguments: object, **named: object) -> Any:  # noqa: ANN401  (whatever it returns)
            with self.part(name):
                return work(*arguments, **named)

        return call
