"""The clock that measurements go by."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds, once the GPU has done what it was told: calls to it return before that."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
