from __future__ import annotations

import os

import pytest
import torch

from smpo_models.memory import is_out_of_memory
from smpo_pipeline import isolation
from smpo_pipeline.isolation import make, run_alone


def maker(bad=(), calls=None, largest=99):
    """A batch that fails if it holds a bad item, or too many."""

    def run(items):
        if calls is not None:
            calls.append(list(items))
        if set(items) & set(bad):
            raise RuntimeError(f"CUDA error: {items}")
        if len(items) > largest:
            raise MemoryError
        return [item * 10 for item in items]

    return run


def test_a_batch_that_does_not_fail_is_made_once():
    calls = []
    outcome = make(maker(calls=calls), [1, 2, 3], "cpu")
    assert (outcome.made, outcome.failed, calls) == ([([0, 1, 2], [10, 20, 30])], {}, [[1, 2, 3]])


def test_what_failed_once_leaves_no_trace():
    failures = [RuntimeError("once")]

    def run(items):
        if failures:
            raise failures.pop()
        return list(items)

    assert make(run, [1, 2], "cpu").made == [([0, 1], [1, 2])]


@pytest.mark.parametrize("bad", [{0}, {7}, {3, 4}, {0, 1, 5}, set(range(7))])
def test_the_others_are_made_as_one_batch_without_those_that_fail_alone(bad):
    outcome = make(maker(bad), range(8), "cpu")
    rest = [item for item in range(8) if item not in bad]
    assert outcome.made == [(rest, [item * 10 for item in rest])]
    assert outcome.failed.keys() == bad
    assert all(reason == f"fails alone: RuntimeError: CUDA error: [{item}]" for item, reason in outcome.failed.items())


def test_all_may_fail():
    outcome = make(maker(range(5)), range(5), "cpu")
    assert outcome.made == []
    assert outcome.failed.keys() == set(range(5))
    assert make(maker([1]), [1], "cpu").failed == {0: "fails alone: RuntimeError: CUDA error: [1]"}


def test_what_fails_only_together_is_made_in_halves():
    outcome = make(maker(bad={6}, largest=3), range(8), "cpu")
    made = {item: value for items, values in outcome.made for item, value in zip(items, values, strict=True)}
    assert made == {item: item * 10 for item in range(8) if item != 6}
    assert outcome.failed.keys() == {6}


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        make(lambda items: {}[items[0]], [1, 2], "cpu")


def test_halves_that_were_made_are_not_made_again():
    calls = []
    outcome = make(maker(largest=4, calls=calls), range(16), "cpu")
    made = {item: value for items, values in outcome.made for item, value in zip(items, values, strict=True)}
    assert made == {item: item * 10 for item in range(16)}
    assert sorted(map(len, calls)) == [4, 4, 4, 4, 8, 8, 8, 8, 16, 16]  # what fails is tried twice
    assert outcome.fits == 4


def test_what_fits_is_remembered_whatever_was_said():
    """Libraries have many words for full memory; each batch to come would fail twice and be bisected."""

    def run(items):
        if len(items) > 2:
            raise RuntimeError("cuDNN Frontend error: words that nobody knows yet")
        return list(items)

    assert make(run, range(8), "cpu").fits == 2
    assert make(maker(), range(4), "cpu").fits is None
    assert make(maker(bad={1}), range(4), "cpu").fits is None
    # 6 fails alone; of the other seven, three are made at once, and two and two.
    assert make(maker(bad={6}, largest=3), range(8), "cpu").fits == 3


@pytest.fixture
def slept(monkeypatch):
    """The pauses, which nobody waits for."""
    found = []
    monkeypatch.setattr(isolation.time, "sleep", found.append)
    return found


@pytest.mark.parametrize("count", [1, 4])
def test_memory_that_others_took_for_a_while_costs_no_item(slept, count):
    def run(items):
        if not slept:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(items)

    outcome = make(run, range(count), "cpu")
    assert sorted(outcome.made) == [([item], [item]) for item in range(count)]
    # What comes next may fit whole again.
    assert (outcome.failed, outcome.fits, outcome.short, slept) == ({}, None, None, [2.0])


def test_an_item_that_memory_never_holds_says_so_and_costs_no_other(slept):
    def run(items):
        if 6 in items:
            raise MemoryError
        return list(items)

    outcome = make(run, range(8), "cpu")
    rest = [item for item in range(8) if item != 6]
    assert outcome.made == [(rest, rest)]
    assert outcome.failed == {6: "too little memory: for it alone, and 2 times after a pause: MemoryError:"}
    assert (outcome.short, slept) == ("MemoryError:", [2.0, 10.0])


def test_alone_an_error_is_dropped_and_a_gpu_that_it_breaks_ends_the_process(monkeypatch):
    """A kill by an assertion on the device comes as an error, after which the device answers nobody."""
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


def test_a_gpu_that_is_full_is_not_taken_for_a_broken_one(slept, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "ones", full)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"ended with {status}"))
    assert make(full, [1], "cuda").short
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
def test_what_full_memory_looks_like(error, full):
    assert is_out_of_memory(error) is full
