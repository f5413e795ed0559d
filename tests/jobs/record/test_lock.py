"""One run at a time on an object store: fsspec's memory store, and a local S3 server."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid

import pytest

from smpo_common.errors import UserError
from smpo_common.store_path import StorePath
from smpo_pipeline.jobs.record import lock
from smpo_pipeline.jobs.record.lock import LEASE_FILE, holder, locked
from tests.command import assert_one_line, run_here
from tests.servers.object_store import object_store


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, object_store(patch.setenv) as faults:
        faults.amazon = False
        yield faults


@pytest.fixture(params=["memory://lease", "s3://bucket"])
def out(request, server, monkeypatch):
    monkeypatch.setattr(lock, "_RENEWED_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_WATCHED_SECONDS", 0.5)
    return StorePath(f"{request.param}/{uuid.uuid4().hex}")


def write(out, **values):
    (out / LEASE_FILE).overwrite(json.dumps({"host": "elsewhere", "process": 1, "number": 0, **values}).encode())


def test_a_lease_is_held_renewed_and_removed(out):
    with locked(out):
        first = (out / LEASE_FILE).read_bytes()
        assert holder(out) == f"process {os.getpid()} on {socket.gethostname()}"
        until = time.monotonic() + 30
        while (out / LEASE_FILE).read_bytes() == first and time.monotonic() < until:
            time.sleep(0.02)
        assert (out / LEASE_FILE).read_bytes() != first
    assert holder(out) is None


@pytest.fixture
def patient(monkeypatch):
    """Long enough to see renewals on a busy machine."""
    monkeypatch.setattr(lock, "_WATCHED_SECONDS", 3)


@pytest.mark.usefixtures("patient")
def test_a_lease_that_another_run_renews_is_refused(out):
    write(out)
    beat, stop = iter(range(1, 10_000)), threading.Event()

    def renew():
        while not stop.wait(0.02):
            write(out, number=next(beat))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        words = f"{out} is being written by another run .process 1 on elsewhere"
        with pytest.raises(UserError, match=words), locked(out):
            raise AssertionError
    finally:
        stop.set()
        thread.join()
    assert (out / LEASE_FILE).is_file()


def test_a_lease_without_renewals_is_taken_over(out):
    write(out)
    with locked(out):
        assert json.loads((out / LEASE_FILE).read_bytes())["host"] == socket.gethostname()
    assert list(out.iterdir()) == []


def write_of_a_dead_process(out, processes):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    write(out, host=socket.gethostname(), processes=processes, process=process.pid)


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(out, monkeypatch):
    monkeypatch.setattr(lock, "_WATCHED_SECONDS", 1e9)
    write_of_a_dead_process(out, lock._process_namespace())
    with locked(out):
        pass


@pytest.mark.parametrize("processes", ["another container on a host of this name", None])
def test_process_numbers_of_other_containers_are_ignored(out, processes):
    write_of_a_dead_process(out, processes)
    started = time.monotonic()
    with locked(out):
        assert time.monotonic() - started >= lock._WATCHED_SECONDS


def test_a_lease_removed_while_watched_goes_to_the_run_that_creates_it_first(out, monkeypatch):
    """Its run ends, a third run starts, and only then does the second one continue."""
    write(out)
    watch, pauses = lock._stale_content, itertools.count()

    def pause(_seconds):
        number = next(pauses)
        if number:
            write(out, host="third", number=number)
        else:
            (out / LEASE_FILE).unlink()

    def watch_and_be_late(path):
        content = watch(path)
        assert content is None
        write(out, host="third")
        return content

    monkeypatch.setattr(lock, "_stale_content", watch_and_be_late)
    monkeypatch.setattr(lock.time, "sleep", pause)
    with pytest.raises(UserError, match="process 1 on third"), locked(out):
        raise AssertionError
    assert json.loads((out / LEASE_FILE).read_bytes())["host"] == "third"


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_exactly_one_of_many_runs_takes_over_a_stale_lease(out):
    """Threads that act as processes of different machines; the one that takes over renews the lease, as a run does."""
    write(out)
    followed, refused, stop = [], [], threading.Event()

    def contend(name):
        content = {"host": name, "process": 1, "run": name, "number": 0}
        try:
            lock._take(out / LEASE_FILE, json.dumps(content).encode())
        except UserError as error:
            refused.append(str(error))
            return
        followed.append(name)
        while not stop.wait(0.02):
            content["number"] += 1
            (out / LEASE_FILE).overwrite(json.dumps(content).encode())

    threads = [threading.Thread(target=contend, args=(f"machine-{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while len(refused) < 5 and time.monotonic() < until:
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(followed) == 1
    assert len(refused) == 5
    # Of a claim that was seen on its way, where this is slow.
    assert all("process 1 on machine-" in words for words in refused)
    assert [path.name for path in out.iterdir()] == [LEASE_FILE]


def test_a_claim_of_a_killed_run_is_taken_over(out):
    write(out)
    claims = []
    create = StorePath.create

    class KilledError(Exception):
        pass

    def killed(path, content):
        made = create(path, content)
        if made and path.name != LEASE_FILE:
            claims.append(path)
            raise KilledError
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorePath, "create", killed)
        patch.setattr(lock, "_process_namespace", lambda: None)
        with pytest.raises(KilledError), locked(out):
            pass
    assert [path.name for path in out.iterdir()] == [LEASE_FILE, claims[0].name]
    with locked(out):
        assert [path.name for path in out.iterdir()] == [LEASE_FILE]
    assert list(out.iterdir()) == []


def test_a_run_that_lost_its_lease_stops_in_one_line_and_leaves_it(out):
    with pytest.raises(UserError, match=f"another run .process 1 on elsewhere. took over {out}"), locked(out):
        write(out, run="follower")
        time.sleep(60)
    assert json.loads((out / LEASE_FILE).read_bytes())["run"] == "follower"


def test_exactly_one_of_many_concurrent_creations_succeeds(out):
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


@pytest.mark.parametrize("stage", ["score", "invert"])
def test_an_unknown_bucket_is_one_line_before_anything_is_read(server, capfd, tmp_path, stage):
    more = ("--reward", "clipscore") if stage == "score" else ("--scores", tmp_path, "--model", tmp_path)
    out = ("--out", "s3://typo/x", "--device", "cpu")
    done = run_here(capfd, "smpo-pipeline", stage, "--pairs", tmp_path, *more, *out)
    assert_one_line(done, "s3://typo/x: The specified bucket does not exist")
