"""--batch-size auto, with a memory and a clock that are played."""

from __future__ import annotations

import pytest
import torch

from smpo_common.errors import UserError
from smpo_pipeline.batch_size import fastest_by_doubling, largest_that_fits


class Device:
    """Holds a batch of so many; one takes the time that is set down for its size."""

    def __init__(self, room: int = 10**9, seconds=lambda size: size, full: Exception | None = None) -> None:
        self.room, self.seconds, self.tried, self.now = room, seconds, [], 0.0
        self.full = full or torch.OutOfMemoryError()

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.room:
            raise self.full
        self.now += self.seconds(size)


@pytest.mark.parametrize(
    ("room", "most", "size", "tried"),
    [
        (1, 100, 1, [1, 2]),
        (12, 100, 8, [1, 2, 4, 8, 16]),
        (16, 100, 16, [1, 2, 4, 8, 16, 32]),
        (1000, 24, 24, [1, 2, 4, 8, 16, 24]),
        (20, 24, 16, [1, 2, 4, 8, 16, 24]),
        (1000, 1, 1, [1]),
    ],
)
def test_the_last_doubling_that_fits_is_taken(room, most, size, tried):
    device = Device(room)
    assert largest_that_fits(device, most) == size
    assert device.tried == tried


def test_a_device_that_does_not_hold_a_batch_of_one_is_said_so():
    with pytest.raises(UserError, match="not hold a batch of one.*--dtype"):
        largest_that_fits(Device(0), 8)


def test_libraries_that_find_no_memory_are_understood():
    device = Device(5, full=RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert largest_that_fits(device, 100) == 4


@pytest.mark.parametrize(("room", "size"), [(0, 1), (1, 1), (5, 4)])
def test_a_batch_that_fails_ends_the_search_at_what_was_made(room, size):
    failing = RuntimeError("CUDA error: device-side assert triggered")
    assert largest_that_fits(Device(room, full=failing), 100) == size
    device = Device(room, seconds=lambda count: 100 + count, full=failing)
    assert fastest_by_doubling(device, 100, clock=lambda: device.now) == size


@pytest.mark.parametrize("search", [largest_that_fits, fastest_by_doubling])
def test_a_bug_keeps_its_traceback(search):
    with pytest.raises(KeyError):
        search({}.__getitem__, 8)


@pytest.mark.parametrize(
    ("overhead", "most", "size"),
    # A batch of n takes overhead + n: doubling n gains 2 (overhead + n) / (overhead + 2n), at least 1.05 up to
    # n = 0.95 / 0.1 x overhead = 9.5 x overhead; from 8 to 12 it gains (12 / 13) / (8 / 9) = 1.04.
    [(0.0, 64, 1), (0.2, 64, 2), (1.0, 64, 16), (1.0, 8, 8), (1.0, 12, 8)],
)
def test_on_cpu_doubling_ends_where_it_gains_less_than_a_twentieth(overhead, most, size):
    device = Device(seconds=lambda count: overhead + count)
    assert fastest_by_doubling(device, most, clock=lambda: device.now) == size
    assert device.tried[0] == 1
    assert max(device.tried) <= most
