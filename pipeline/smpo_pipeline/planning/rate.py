"""How fast trajectories are made on this device: measured."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.batch_size import Request, batches_of_one_size, trajectory_requests
from smpo_pipeline.inversion.inverter import Inverter


@dataclass(frozen=True)
class Rate:
    """What was measured.

    Attributes:
        trajectories: made in the measured time.
        seconds: that time, from prepared pixels to samples in memory: VAE, text encoders and denoiser.
        forwards: of denoisers, images counted, in that time.
        warm: False where a single batch took longer than there was time: its start-up is then part of the time.
        peak_memory: bytes of GPU memory that were taken at the most meanwhile, weights included; None on CPU. What a
            trial of too large a batch took before is not among them.
    """

    trajectories: int
    seconds: float
    forwards: int
    warm: bool
    peak_memory: int | None


def batches_of_units(
    pairs: Sequence[PreparedPair], trajectories: int, pairs_per_unit: int, batch_size: int
) -> Iterator[list[Request]]:
    """Endless batches as `invert` cuts them: of one image size each, and never of two units.

    Those of a unit come in a random order (always the same), so that the first ones, which may be all that is
    measured, are as full as the others.

    Args:
        pairs: of a sample; where they are used up, further trajectories of them are made, which have draws of their
        own.
        trajectories: of each pair.
        pairs_per_unit: in one unit of work.
        batch_size: trajectories a batch, at the most.
    """
    order = random.Random(0)
    shown = trajectory_requests(pairs)
    while True:
        unit = [
            (pair, turn * trajectories + trajectory)
            for pair, turn in islice(shown, pairs_per_unit)
            for trajectory in range(trajectories)
        ]
        batches = list(batches_of_one_size(unit, lambda: batch_size))
        order.shuffle(batches)
        yield from ([unit[position] for position in batch] for batch in batches)


def measure_rate(
    inverter: Inverter,
    denoisers: Iterable[nn.Module],
    batches: Iterator[list[Request]],
    seconds: float,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:
    """Make batches for some time, after one that warms up.

    Args:
        inverter: at work on the device.
        denoisers: the modules whose forwards are counted.
        batches: what to make.
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

        def batch() -> int:
            requests = next(batches)
            inverter.invert(requests)
            return len(requests)

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = clock()
        size = batch()
        warm_up = clock() - start
        if warm_up >= seconds:
            return Rate(size, warm_up, count, warm=False, peak_memory=_peak(device))
        count = trajectories = 0
        begin = clock()
        while not trajectories or clock() - start < seconds:
            trajectories += batch()
        return Rate(trajectories, clock() - begin, count, warm=True, peak_memory=_peak(device))


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
