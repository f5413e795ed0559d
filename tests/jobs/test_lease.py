"""One run at a time on an object store, with fsspec's in-memory one in its place."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import uuid

import pytest

from smpo_pipeline.jobs import lease
from smpo_pipeline.jobs.lease import LEASE_FILE, leased
from smpo_pipeline.jobs.lock import holder, locked
from smpo_schemas.errors import UserError
from smpo_schemas.store import StorePath


@pytest.fixture
def out(monkeypatch):
    monkeypatch.setattr(lease, "_RENEWED_SECONDS", 0.02)
    monkeypatch.setattr(lease, "_WATCHED_SECONDS", 0.5)
    return StorePath(f"memory://lease/{uuid.uuid4().hex}")


def write(out, **values):
    (out / LEASE_FILE).overwrite(json.dumps({"host": "elsewhere", "process": 1, "number": 0, **values}).encode())


def test_a_lease_is_held_renewed_and_given_back(out):
    with locked(out):
        first = (out / LEASE_FILE).read_bytes()
        assert holder(out) == f"process {os.getpid()} on {socket.gethostname()}"
        threading.Event().wait(0.2)
        assert (out / LEASE_FILE).read_bytes() != first
    assert holder(out) is None


def test_a_lease_that_is_renewed_elsewhere_is_refused(out):
    write(out)
    beat, stop = iter(range(1, 10_000)), threading.Event()

    def renew():
        while not stop.wait(0.02):
            write(out, number=next(beat))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        words = f"{out} is being written by another run .process 1 on elsewhere"
        with pytest.raises(UserError, match=words), leased(out):
            raise AssertionError
    finally:
        stop.set()
        thread.join()
    assert (out / LEASE_FILE).is_file()


def test_a_lease_that_nobody_renews_is_taken_over(out):
    write(out)
    with leased(out):
        assert json.loads((out / LEASE_FILE).read_bytes())["host"] == socket.gethostname()


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(out, monkeypatch):
    monkeypatch.setattr(lease, "_WATCHED_SECONDS", 1e9)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    write(out, host=socket.gethostname(), process=process.pid)
    with leased(out):
        pass


def test_of_many_who_create_at_once_one_succeeds(out):
    made = []
    threads = [
        threading.Thread(target=lambda number=number: made.append((out / "x").create(str(number).encode())))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(made) == 1
