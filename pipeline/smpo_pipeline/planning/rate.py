"""Measure how fast trajectories or images are made on this device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import nn

from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.requests import Request, batches_of_one_size, trajectory_requests

Item = TypeVar("Item")
"""A trajectory or image to make."""


@dataclass(frozen=True)
class Rate:
    """A measurement.

    Attributes:
        trajectories: number made in the measured time; of images, for a generation.
        seconds: measured time, from what is prepared to results in memory: VAE, text encoders and denoiser.
        forwards: forwards of the denoisers in that time, one per image.
        warm: False if the first batch alone took longer than the time given: its warm-up is then included.
        peak_memory: peak GPU memory in bytes, weights included, without earlier trials of batch sizes; None on CPU.
    """

    trajectories: int
    seconds: float
    forwards: int
    warm: bool
    peak_memory: int | None


def batches_of_units(
    pairs: Sequence[PreparedPair], trajectories: int, pairs_per_unit: int, batch_size: int
) -> Iterator[list[Request]]:
    """Yield batches as `invert` makes them, without end: each of one image size and one unit.

    The batches of a unit are shuffled (with a fixed seed), so that the first ones, which may be all that is measured,
    are as full as the others.

    Args:
        pairs: sampled pairs, repeated with further trajectories once they are used up.
        trajectories: trajectories per pair.
        pairs_per_unit: pairs per unit of work.
        batch_size: most trajectories per batch.
    """
    order = random.Random(0)
    requests = trajectory_requests(pairs)
    while True:
        unit = [
            (pair, turn * trajectories + trajectory)
            for pair, turn in islice(requests, pairs_per_unit)
            for trajectory in range(trajectories)
        ]
        batches = list(batches_of_one_size(unit, lambda: batch_size))
        order.shuffle(batches)
        yield from ([unit[position] for position in batch] for batch in batches)


def measure_rate(
    make: Callable[[list[Item]], object],
    denoisers: Iterable[nn.Module],
    batches: Iterator[list[Item]],
    seconds: float,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:
    """Make batches for some time, after one for warm-up.

    Args:
        make: makes a batch on the device.
        denoisers: modules whose forwards are counted.
        batches: what to make.
        seconds: time to measure, warm-up included; the last batch may end later.
        device: cpu or cuda.
        clock: in seconds.
    """
    count = 0

    def counted(_module: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        nonlocal count
        # UNets are given the latents as the first argument, transformers by name.
        count += len(inputs[0] if inputs else named["hidden_states"])

    with ExitStack() as hooks:
        for module in denoisers:
            hooks.callback(module.register_forward_pre_hook(counted, with_kwargs=True).remove)

        def batch() -> int:
            items = next(batches)
            make(items)
            return len(items)

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
