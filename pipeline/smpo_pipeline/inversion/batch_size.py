"""``--batch-size auto``: the largest batch of trajectories that is worth having on this device.

A trajectory does not depend on the batch it is made in (but for the rounding of matrix products), so the size is a
matter of speed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from smpo_common.errors import UserError
from smpo_models.memory import is_out_of_memory
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.isolation import FAILURES

Request = tuple[PreparedPair, int]
"""A pair, and the number of the trajectory of it to make."""

WORTHWHILE_GAIN = 1.05
"""On CPU: a doubling that speeds trajectories up by less is the last one tried."""


def trajectory_requests(pairs: Sequence[PreparedPair], first_trajectory: int = 0) -> Iterator[Request]:
    """Yield trajectories of a few pairs without end; further rounds have draws of their own."""
    number = first_trajectory
    while True:
        yield from ((pair, number) for pair in pairs)
        number += 1


def batches_of_one_size(requests: Sequence[Request], batch_size: Callable[[], int]) -> Iterator[list[int]]:
    """Cut requests into batches, each of one image size: positions in ``requests``, of every size in their order.

    Args:
        requests: of any image sizes.
        batch_size: asked for each batch, since one may find that memory holds less.
    """
    by_size: dict[tuple[int, ...], list[int]] = {}
    for position, (pair, _) in enumerate(requests):
        by_size.setdefault(pair.pixels_2HW3.shape, []).append(position)
    for positions in by_size.values():
        left = iter(positions)
        while batch := list(islice(left, batch_size())):
            yield batch


def with_most_pixels(pairs: Sequence[PreparedPair], resolution: int) -> list[PreparedPair]:
    """The pairs as if they were in the bucket that takes most memory, the square; what they show does not matter."""
    return [replace(pair, pixels_2HW3=np.resize(pair.pixels_2HW3, (2, resolution, resolution, 3))) for pair in pairs]


def largest_that_fits(try_batch: Callable[[int], object], most: int) -> int:
    """On a GPU: double until memory runs out, or a batch fails otherwise; that is found again where batches count.

    Args:
        try_batch: makes a batch of so many trajectories, or raises as devices do that have no memory left.
        most: no larger batch can be filled.

    Raises:
        UserError: not even one trajectory fits.
    """
    fitting, size = 0, 1
    while fitting < most:
        try:
            try_batch(size)
        except FAILURES as error:
            if not is_out_of_memory(error):
                return max(fitting, 1)
            break
        fitting, size = size, min(2 * size, most)
    # What the failed attempt reserved, and the smaller ones in other sizes, is of no use to the batches to come.
    torch.cuda.empty_cache()
    if not fitting:
        raise UserError(
            "--batch-size auto: the device's memory does not hold a single trajectory; a narrower --dtype, "
            "a smaller --resolution, or another device"
        )
    return fitting


def fastest_by_doubling(
    try_batch: Callable[[int], object], most: int, clock: Callable[[], float] = time.perf_counter
) -> int:
    """On a CPU, where memory is not the limit: double while that makes trajectories faster by :data:`WORTHWHILE_GAIN`.

    A batch that fails ends this: it fails again where batches count.

    Args:
        try_batch: makes a batch of so many trajectories.
        most: no larger batch can be filled.
        clock: in seconds.
    """

    def trajectories_a_second(size: int) -> float:
        start = clock()
        try_batch(size)
        return size / (clock() - start)

    size = 1
    with suppress(*FAILURES):
        try_batch(1)  # the first call pays for what is set up once
        rate = trajectories_a_second(1)
        while size < most:
            doubled = min(2 * size, most)
            faster = trajectories_a_second(doubled)
            if faster < WORTHWHILE_GAIN * rate:
                break
            size, rate = doubled, faster
    return size


def choose_batch_size(try_batch: Callable[[int], object], most: int, device: str) -> int:
    """The batch size for a device, ``cpu`` or ``cuda``."""
    return largest_that_fits(try_batch, most) if device == "cuda" else fastest_by_doubling(try_batch, most)
