"""Trajectories to make, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from smpo_pipeline.inversion.batch import PreparedPair

Request = tuple[PreparedPair, int]
"""A pair, and the number of the trajectory of it to make."""


def trajectory_requests(pairs: Sequence[PreparedPair], first_trajectory: int = 0) -> Iterator[Request]:
    """Yield trajectories of a few pairs without end; each round over the pairs has draws of its own."""
    number = first_trajectory
    while True:
        yield from ((pair, number) for pair in pairs)
        number += 1


def batches_of_one_size(requests: Sequence[Request], batch_size: Callable[[], int]) -> Iterator[list[int]]:
    """Cut requests into batches of one image size each: yield positions in ``requests``, in order within each size.

    Args:
        requests: of any image sizes.
        batch_size: called for each batch, since the size shrinks if a batch runs out of memory.
    """
    by_size: dict[tuple[int, ...], list[int]] = {}
    for position, (pair, _) in enumerate(requests):
        by_size.setdefault(pair.pixels_2HW3.shape, []).append(position)
    for positions in by_size.values():
        left = iter(positions)
        while batch := list(islice(left, batch_size())):
            yield batch


def with_most_pixels(pairs: Sequence[PreparedPair], resolution: int) -> list[PreparedPair]:
    """Return the pairs at the square size, whose bucket takes most memory; their pixels no longer mean anything."""
    return [replace(pair, pixels_2HW3=np.resize(pair.pixels_2HW3, (2, resolution, resolution, 3))) for pair in pairs]
