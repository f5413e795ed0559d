from __future__ import annotations

import threading

import pytest

from smpo_common.errors import UserError
from smpo_pipeline.jobs.faults.crashes import REJECT_AFTER, RETRY_ONE_BY_ONE_AFTER, STOP_AFTER, CrashGuard, WorkLog


class Death(BaseException):
    """What nobody catches, as a kill."""


def work(work_log: WorkLog, items, deadly) -> tuple[dict[int, str], list]:
    """One life of a worker: what is found, and what is made of the rest."""
    guard = CrashGuard(work_log)
    tried = []

    def run(item):
        tried.append(item)
        if item in deadly:
            raise Death

    found = guard.crashing_items("unit", run, items)
    work_log.begin("unit")
    for position, item in enumerate(items):
        if position not in found and item in deadly:
            raise Death
    work_log.end("unit")
    return found, tried


def lives(items, deadly):
    work_log, deaths = WorkLog(), 0
    while True:
        try:
            return *work(work_log, items, deadly), deaths
        except Death:
            deaths += 1


def test_nobody_is_looked_at_while_nobody_dies():
    assert lives("abc", "") == ({}, [], 0)


@pytest.mark.parametrize("deadly", ["a", "d", "bc", "abcd"])
def test_those_that_kill_are_found_and_nobody_else(deadly):
    items = [*"abcde"]
    found, tried, deaths = lives(items, deadly)
    assert {items[position] for position in found} == set(deadly)
    assert all(reason.startswith("crashes its worker: ") for reason in found.values())
    assert deaths == RETRY_ONE_BY_ONE_AFTER + REJECT_AFTER * len(deadly)
    # In the last life only those that nobody had come to before are tried.
    assert tried == [item for item in items[max(items.index(each) for each in deadly) :] if item not in deadly]


def test_a_piece_that_kills_though_none_of_its_items_does_ends_the_job():
    work_log = WorkLog()
    guard = CrashGuard(work_log)
    for _ in range(STOP_AFTER):
        with guard.working("other", "x"):
            pass
        work_log.begin("unit")
    with (
        pytest.raises(UserError, match="6 workers died, each while unit 1 was made"),
        guard.working("unit", "unit 1 was made"),
    ):
        pass
    with guard.working("other", "x"):
        pass


def test_an_error_is_no_death():
    work_log = WorkLog()
    with pytest.raises(ValueError, match="seen"), CrashGuard(work_log).working("unit", "x"):
        raise ValueError("seen")
    assert work_log.crashes("unit") == 0


def test_while_one_thread_looks_for_a_killer_no_other_works():
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


def test_an_error_that_is_seen_forgets_no_deaths():
    """A commit that fails for a moment is tried again: what killed before it would else kill again, and for ever."""
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
