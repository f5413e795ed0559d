from __future__ import annotations

import os

import pytest
import torch

from smpo_models.memory import is_out_of_memory
from smpo_pipeline import isolation
from smpo_pipeline.isolation import run_alone, run_isolated


def maker(bad=(), calls=None, largest=99):
    """Make a function that fails if a batch has a bad item or too many items."""

    def run(items):
        if calls is not None:
            calls.append(list(items))
        if set(items) & set(bad):
            raise RuntimeError(f"CUDA error: {items}")
        if len(items) > largest:
            raise MemoryError
        return [item * 10 for item in items]

    return run


def test_a_batch_that_succeeds_is_run_once():
    calls = []
    outcome = run_isolated(maker(calls=calls), [1, 2, 3], "cpu")
    assert (outcome.results, outcome.failed, calls) == ([([0, 1, 2], [10, 20, 30])], {}, [[1, 2, 3]])


def test_a_failure_that_does_not_recur_leaves_no_trace():
    failures = [RuntimeError("once")]

    def run(items):
        if failures:
            raise failures.pop()
        return list(items)

    assert run_isolated(run, [1, 2], "cpu").results == [([0, 1], [1, 2])]


@pytest.mark.parametrize("bad", [{0}, {7}, {3, 4}, {0, 1, 5}, set(range(7))])
def test_items_that_do_not_fail_alone_are_run_as_one_batch(bad):
    outcome = run_isolated(maker(bad), range(8), "cpu")
    rest = [item for item in range(8) if item not in bad]
    assert outcome.results == [(rest, [item * 10 for item in rest])]
    assert outcome.failed.keys() == bad
    assert all(reason == f"fails alone: RuntimeError: CUDA error: [{item}]" for item, reason in outcome.failed.items())


def test_all_items_may_fail():
    outcome = run_isolated(maker(range(5)), range(5), "cpu")
    assert outcome.results == []
    assert outcome.failed.keys() == set(range(5))
    assert run_isolated(maker([1]), [1], "cpu").failed == {0: "fails alone: RuntimeError: CUDA error: [1]"}


def test_items_that_fail_only_together_are_run_in_halves():
    outcome = run_isolated(maker(bad={6}, largest=3), range(8), "cpu")
    made = {item: value for items, values in outcome.results for item, value in zip(items, values, strict=True)}
    assert made == {item: item * 10 for item in range(8) if item != 6}
    assert outcome.failed.keys() == {6}


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_isolated(lambda items: {}[items[0]], [1, 2], "cpu")


def test_halves_that_succeed_are_not_run_again():
    calls = []
    outcome = run_isolated(maker(largest=4, calls=calls), range(16), "cpu")
    made = {item: value for items, values in outcome.results for item, value in zip(items, values, strict=True)}
    assert made == {item: item * 10 for item in range(16)}
    assert sorted(map(len, calls)) == [4, 4, 4, 4, 8, 8, 8, 8, 16, 16]  # what fails is tried twice
    assert outcome.largest_batch == 4


def test_the_largest_batch_is_reported_for_any_error_message():
    """Libraries have many messages for full memory. Without the size, each later batch would fail and be bisected."""

    def run(items):
        if len(items) > 2:
            raise RuntimeError("cuDNN Frontend error: an unknown message")
        return list(items)

    assert run_isolated(run, range(8), "cpu").largest_batch == 2
    assert run_isolated(maker(), range(4), "cpu").largest_batch is None
    assert run_isolated(maker(bad={1}), range(4), "cpu").largest_batch is None
    # 6 fails alone; the other seven succeed in batches of three, two and two.
    assert run_isolated(maker(bad={6}, largest=3), range(8), "cpu").largest_batch == 3


@pytest.fixture
def slept(monkeypatch):
    """The pauses that would be made."""
    pauses = []
    monkeypatch.setattr(isolation.time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("count", [1, 4])
def test_lack_of_memory_for_a_while_fails_no_item(slept, count):
    def run(items):
        if not slept:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(items)

    outcome = run_isolated(run, range(count), "cpu")
    assert sorted(outcome.results) == [([item], [item]) for item in range(count)]
    # The next batch may fit as a whole again.
    assert (outcome.failed, outcome.largest_batch, outcome.out_of_memory, slept) == ({}, None, None, [2.0])


def test_an_item_too_large_for_memory_fails_alone(slept):
    def run(items):
        if 6 in items:
            raise MemoryError
        return list(items)

    outcome = run_isolated(run, range(8), "cpu")
    rest = [item for item in range(8) if item != 6]
    assert outcome.results == [(rest, rest)]
    assert outcome.failed == {6: "too little memory: for it alone, and 2 times after a pause: MemoryError:"}
    assert (outcome.out_of_memory, slept) == ("MemoryError:", [2.0, 10.0])


def test_run_alone_ignores_errors_and_exits_if_the_gpu_is_broken(monkeypatch):
    """A device-side assertion is an error, after which the GPU does not respond."""
    run_alone(maker(bad=[1]), 1, "cpu")
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    run_alone(maker(bad=[1]), 1, "cuda")
    assert ended == []

    def broken(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "ones", broken)
    run_alone(maker(), 1, "cuda")
    assert ended == []
    run_alone(maker(bad=[1]), 1, "cuda")
    assert ended[0] == 1


def test_a_full_gpu_is_not_a_broken_gpu(slept, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", full)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"ended with {status}"))
    assert run_isolated(full, [1], "cuda").out_of_memory
    assert len(slept) == 2


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error, full):
    assert is_out_of_memory(error) is full
