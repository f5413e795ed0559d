"""How fast walks are made on this device: measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from smpo_pipeline.inversion.batch_size import Request
from smpo_pipeline.inversion.inverter import Inverter


@dataclass(frozen=True)
class Rate:
    """What was measured.

    Attributes:
        walks: made in the measured time.
        seconds: that time, from prepared pixels to samples in memory: VAE, text encoders and denoiser.
        forwards: of denoisers, images counted, in that time.
        warm: False where a single batch took longer than there was time: its start-up is then part of the time.
        peak_memory: bytes of GPU memory that were taken at the most meanwhile, weights included; None on CPU. What a
            trial of too large a batch took before is not among them.
    """

    walks: int
    seconds: float
    forwards: int
    warm: bool
    peak_memory: int | None


def measure_rate(
    inverter: Inverter,
    denoisers: Iterable[nn.Module],
    requests: Iterator[Request],
    batch_size: int,
    seconds: float,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:
    """Make batches for some time, after one that warms up.

    Args:
        inverter: at work on the device.
        denoisers: the modules whose forwards are counted.
        requests: what to make.
        batch_size: walks a batch.
        seconds: how long, warm-up included; the last batch may end later.
        device: cpu or cuda.
        clock: in seconds.
    """
    count = 0

    def counted(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        count += len(inputs[0])

    with ExitStack() as hooks:
        for module in denoisers:
            hooks.callback(module.register_forward_pre_hook(counted).remove)

        def batch() -> None:
            inverter.invert([next(requests) for _ in range(batch_size)])

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = clock()
        batch()
        warm_up = clock() - start
        if warm_up >= seconds:
            return Rate(batch_size, warm_up, count, warm=False, peak_memory=_peak(device))
        count = walks = 0
        begin = clock()
        while not walks or clock() - start < seconds:
            batch()
            walks += batch_size
        return Rate(walks, clock() - begin, count, warm=True, peak_memory=_peak(device))


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
