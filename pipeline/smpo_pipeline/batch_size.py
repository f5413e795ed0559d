"""``--batch-size auto``: the largest batch that is worth having on this device.

A trajectory or an image does not depend on the batch it is made in (but for the rounding of matrix products), so the
size is a matter of speed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch

from smpo_common.errors import UserError
from smpo_models.memory import is_out_of_memory
from smpo_pipeline.isolation import FAILURES

WORTHWHILE_GAIN = 1.05
"""On CPU: a doubling that speeds the work up by less is the last one tried."""


def largest_that_fits(try_batch: Callable[[int], object], most: int) -> int:
    """Return the largest batch that fits on a GPU: double the size until memory runs out.

    A batch that fails for another reason also ends the search; the run itself will meet that failure again.

    Args:
        try_batch: runs a batch of the given size, and raises if memory runs out.
        most: largest size to try.

    Raises:
        UserError: not even a batch of one fits.
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
            "--batch-size auto: the device's memory does not hold a batch of one; use a narrower --dtype, a smaller "
            "--resolution, or another device"
        )
    return fitting


def fastest_by_doubling(
    try_batch: Callable[[int], object], most: int, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Return the batch size for a CPU, where memory is not the limit: double it while that pays.

    A doubling pays if it speeds the work up by :data:`WORTHWHILE_GAIN`. A batch that fails ends the search; the run
    itself will meet that failure again.

    Args:
        try_batch: runs a batch of the given size.
        most: largest size to try.
        clock: in seconds.
    """

    def rate_of(size: int) -> float:
        start = clock()
        try_batch(size)
        return size / (clock() - start)

    size = 1
    with suppress(*FAILURES):
        try_batch(1)  # the first call pays for what is set up once
        rate = rate_of(1)
        while size < most:
            doubled = min(2 * size, most)
            faster = rate_of(doubled)
            if faster < WORTHWHILE_GAIN * rate:
                break
            size, rate = doubled, faster
    return size


def choose_batch_size(try_batch: Callable[[int], object], most: int, device: str) -> int:
    """Choose the batch size for a device, ``cpu`` or ``cuda``; see the functions above for the arguments."""
    return largest_that_fits(try_batch, most) if device == "cuda" else fastest_by_doubling(try_batch, most)
