"""The clock of the measurements."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Current time in seconds, after waiting for the GPU, whose calls return before they are done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
