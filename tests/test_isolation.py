from __future__ import annotations

import pytest

from smpo_pipeline.isolation import make


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
