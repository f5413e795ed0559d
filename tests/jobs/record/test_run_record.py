"""A run's directory: one writer, and records that match their files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tenacity

from smpo_common import retry
from smpo_common.errors import UserError
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.record.lock import holder, locked
from smpo_pipeline.jobs.record.reject_rate import RejectRate
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord, read_identity
from smpo_schemas.rejects import Reject

HOLD = """
import sys, time
from pathlib import Path
from smpo_pipeline.jobs.record.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_directory_has_one_run_and_a_killed_run_does_not_hold_it(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        holder = rf"written by another run \(process {process.pid} on .*--out"
        with pytest.raises(UserError, match=holder), locked(out):
            pass
        process.kill()
    assert (out / ".lock").is_file()
    holder = f"another run .process {os.getpid()} on "
    with locked(out), pytest.raises(UserError, match=holder), locked(out):
        pass
    assert list(out.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match="cannot write"), locked(out):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_a_killed_run_leaves_a_lock_file_to_remove(number, tmp_path, monkeypatch):
    flock, out = fcntl.flock, tmp_path / "out"

    def refuse(_descriptor, _operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(out):
        assert f"process {os.getpid()} on " in holder(out)
        # Also if another machine's mount has locks.
        for other in (refuse, flock):
            monkeypatch.setattr(fcntl, "flock", other)
            assert f"process {os.getpid()} on " in holder(out)
            with pytest.raises(UserError, match=rf"{out}/.lock .*process {os.getpid()} on .* delete"), locked(out):
                pass
        assert (out / ".lock").is_file()
        (tmp_path / "left by a kill").write_bytes((out / ".lock").read_bytes())
    assert list(out.iterdir()) == []
    assert holder(out) is None
    (tmp_path / "left by a kill").rename(out / ".lock")
    with pytest.raises(UserError, match="delete"), locked(out):
        pass
    (out / ".lock").unlink()
    with locked(out):
        pass


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path, "marker.json", {"seed": 1})
    run.open(overwrite=False, patterns=())
    for unit in range(6):
        content = f"shard {unit}".encode()
        (tmp_path / f"{unit}.tar").write_bytes(content)
        entry = {"name": f"{unit}.tar", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record = UnitRecord(unit=unit, pairs_in=1, pairs=1, rejects=[], entry=entry)
        run.commit(record)
    return run


def test_a_unit_whose_file_differs_from_its_record_is_made_again(run):
    (run.out / "0.tar").unlink()
    (run.out / "1.tar").write_bytes(b"cut")
    (run.out / "2.tar").write_bytes(b"shard X")
    (run.out / "3.tar").write_bytes(b"shard 3")
    run.record_path(4).write_text('{"unit": 4')
    assert sorted(run.records()) == [3, 5]
    assert [unit for unit in range(6) if run.committed(unit)] == [3, 5]


def test_commits_of_another_runs_worker_are_ignored(run):
    """It started before --overwrite, with other settings, and ends after it."""
    late = Run(run.out, "marker.json", {"seed": 0})
    for unit in (0, 7):
        late.commit(UnitRecord(unit=unit, pairs_in=1, pairs=0, rejects=[], entry=None))
    assert sorted(run.records()) == list(range(6))
    assert run.committed(0).entry
    assert not run.committed(7)
    run.require_current()
    with pytest.raises(UserError, match=f"another run .* {run.out}"):
        late.require_current()
    (run.out / "run.json").unlink()  # while another run starts
    with pytest.raises(UserError, match=f"another run .* {run.out}"):
        late.require_current()


def test_an_actor_of_another_run_does_not_overwrite_a_shard(run):
    actor = object.__new__(InvertActor)
    actor._run = Run(run.out, "marker.json", {"seed": 0})
    actor._trajectories = lambda *_: iter(())
    shard = run.out / "shard-000000.tar"
    shard.write_bytes(b"of this run")
    with pytest.raises(UserError, match=f"another run .* {run.out}"):
        actor._commit(0, [], [], {})
    assert shard.read_bytes() == b"of this run"
    assert not list(run.out.glob(".*.tmp"))


def failing_once_each(monkeypatch, number):
    """Make the first opening of each file fail; return the list of their names."""
    failed = []
    open_file = io.open

    def fail(path, *args, **kwargs):
        name = Path(path).name if isinstance(path, (str, Path)) else "descriptor"
        if name.endswith(".json") and name not in failed:
            failed.append(name)
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", fail)
    return failed


def test_reading_records_is_retried_on_transient_errors(run, monkeypatch):
    monkeypatch.setattr(retry.TRANSIENT_RETRY, "wait", tenacity.wait_none())
    monkeypatch.setattr(retry.TRANSIENT_RETRY, "stop", tenacity.stop_never)
    failed = failing_once_each(monkeypatch, errno.ESTALE)
    assert sorted(run.records()) == list(range(6))
    assert len(failed) == 6
    failed.clear()
    assert run.open(overwrite=False, patterns=())
    assert failed == ["run.json"]


def test_other_storage_errors_are_not_retried(run, monkeypatch):
    failing_once_each(monkeypatch, errno.ENODEV)
    with pytest.raises(OSError, match="No such device"):
        run.records()


def test_leftovers_of_killed_runs_are_removed(run):
    (run.out / ".0.tar.77.tmp").write_bytes(b"half")
    (run.out / ".units" / ".000000.json.77.tmp").write_bytes(b"half")
    assert run.open(overwrite=False, patterns=())
    assert not list(run.out.rglob("*.tmp"))
    # Killed after the marker was written.
    (run.out / "marker.json").write_text("{}")
    assert not run.open(overwrite=False, patterns=())
    assert {path.name for path in run.out.iterdir()} == {
        "marker.json",
        "run.json",
        *(f"{unit}.tar" for unit in range(6)),
    }


@pytest.mark.parametrize("damaged", [False, True])
def test_overwrite_removes_the_files_of_this_job_and_no_others(run, damaged):
    (run.out / "marker.json").write_text("{}")
    (run.out / "notes.txt").write_text("mine")
    if damaged:
        (run.out / "run.json").write_text("{")
    other = Run(run.out, "marker.json", {"seed": 2})
    with pytest.raises(UserError, match="is not a readable JSON" if damaged else "seed: 1 there, 2 here.*--overwrite"):
        other.open(overwrite=False, patterns=("*.tar",))
    assert other.open(overwrite=True, patterns=("*.tar",))
    assert {path.name for path in run.out.iterdir()} == {"notes.txt", "run.json"}
    assert read_identity(run.out) == {"seed": 2}
    assert other.records() == {}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_directory_of_another_job_is_not_changed(tmp_path, overwrite):
    score = Run(tmp_path, "scores.json", {"job": "score", "seed": 1})
    score.open(overwrite=False, patterns=())
    for name in ("scores.json", "rejected.parquet"):
        (tmp_path / name).write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    invert = Run(tmp_path, "manifest.json", {"job": "invert", "seed": 1})
    with pytest.raises(UserError, match=r"output of `score`.* --out$"):
        invert.open(overwrite=overwrite, patterns=("rejected.parquet",))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not score.open(overwrite=False, patterns=())


def record_of(rows: int, rejected: int) -> UnitRecord:
    rejects = [
        Reject(pair_id=None, source=f"f:{row}", stage="score", reason="image not readable: x")
        for row in range(rejected)
    ]
    return UnitRecord(unit=0, pairs_in=rows, pairs=rows - rejected, rejects=rejects, entry=None)


def test_too_many_rejects_stop_a_run_and_few_do_not(tmp_path):
    rate = RejectRate(0.05, tmp_path)
    rate.add(record_of(20, 10))
    rate.add(record_of(380, 10))
    rate.add(record_of(400, 20))
    with pytest.raises(
        UserError, match=r"41 of 810 pairs .* --max-reject-rate 0.05 .*41 image not readable; .*f:0.* --max-reject-rate"
    ):
        rate.add(record_of(10, 1))
    with pytest.raises(UserError, match="11 of 11 pairs"):
        RejectRate(0.05, tmp_path).add(record_of(11, 11))
    with pytest.raises(UserError, match="1 of 400 pairs"):
        RejectRate(0, tmp_path).add(record_of(400, 1))
    RejectRate(0, tmp_path).add(record_of(400, 0))
    RejectRate(1, tmp_path).add(record_of(400, 400))
