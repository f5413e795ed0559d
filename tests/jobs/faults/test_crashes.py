from __future__ import annotations

import threading

import pytest

from smpo_common.errors import UserError
from smpo_pipeline.jobs.faults.crashes import REJECT_AFTER, RETRY_ONE_BY_ONE_AFTER, STOP_AFTER, CrashGuard
from smpo_pipeline.jobs.record.work_log import WorkLog


class Death(BaseException):
    """Not caught by any handler, like a kill."""


def work(work_log: WorkLog, items, deadly) -> tuple[dict[int, str], list]:
    """One life of a worker: the crashing items, and the items tried."""
    guard = CrashGuard(work_log)
    tried = []

    def run(item):
        tried.append(item)
        if item in deadly:
            raise Death

    crashing = guard.crashing_items("unit", run, items)
    work_log.begin("unit")
    for position, item in enumerate(items):
        if position not in crashing and item in deadly:
            raise Death
    work_log.end("unit")
    return crashing, tried


def lives(items, deadly):
    work_log, deaths = WorkLog(), 0
    while True:
        try:
            return *work(work_log, items, deadly), deaths
        except Death:
            deaths += 1


def test_without_crashes_no_item_is_tried_alone():
    assert lives("abc", "") == ({}, [], 0)


@pytest.mark.parametrize("deadly", ["a", "d", "bc", "abcd"])
def test_exactly_the_crashing_items_are_found(deadly):
    items = [*"abcde"]
    crashing, tried, deaths = lives(items, deadly)
    assert {items[position] for position in crashing} == set(deadly)
    assert all(reason.startswith("crashes its worker: ") for reason in crashing.values())
    assert deaths == RETRY_ONE_BY_ONE_AFTER + REJECT_AFTER * len(deadly)
    # In the last life only the items after the last crash are tried.
    assert tried == [item for item in items[max(items.index(item) for item in deadly) :] if item not in deadly]


def test_a_piece_that_crashes_although_no_item_does_stops_the_job():
    work_log = WorkLog()
    guard = CrashGuard(work_log)
    for _ in range(STOP_AFTER):
        with guard.working("other", "x"):
            pass
        work_log.begin("unit")
    with (
        pytest.raises(UserError, match="6 workers died .*inverting unit 1"),
        guard.working("unit", "inverting unit 1"),
    ):
        pass
    with guard.working("other", "x"):
        pass


def test_a_reported_error_is_not_a_crash():
    work_log = WorkLog()
    with pytest.raises(ValueError, match="seen"), CrashGuard(work_log).working("unit", "x"):
        raise ValueError("seen")
    assert work_log.crashes("unit") == 0


def test_items_are_tried_alone_while_no_other_thread_works():
    work_log = WorkLog()
    work_log.begin("b")
    work_log.begin("b")
    guard, order, inside = CrashGuard(work_log), [], threading.Event()

    def first():
        with guard.working("a", "a"):
            inside.set()
            threading.Event().wait(0.2)
            order.append("a worked")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    guard.crashing_items("b", lambda _: order.append("b tried"), "b")
    thread.join()
    assert order == ["a worked", "b tried"]


def test_a_reported_error_keeps_the_crash_count():
    """Otherwise an item that crashes workers would do so forever, between commits that fail and are retried."""
    work_log = WorkLog()
    guard = CrashGuard(work_log)
    for _ in range(RETRY_ONE_BY_ONE_AFTER):
        work_log.begin("unit")
    with pytest.raises(OSError, match="away"), guard.working("unit", "x"):
        raise OSError("away")
    assert work_log.crashes("unit") == RETRY_ONE_BY_ONE_AFTER
    with guard.working("unit", "x"):
        pass
    assert work_log.crashes("unit") == 0
