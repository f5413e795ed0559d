"""One run at a time in a directory: a file lock on disk, a lease on an object store, which has no locks.

A run creates the lease, an object that only one run can create, and rewrites it every few seconds. Another run that
finds a lease watches it for a while: if the lease changes, the other run is refused; if not, the lease's run was killed
and the other run takes over. Clocks of two machines are never compared. If several runs find the same stale lease, the
one that creates the claim takes over.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from smpo_common import run_lock
from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath, StorePath

LEASE_FILE = ".lease"

_RENEWED_SECONDS = 15.0
_WATCHED_SECONDS = 50.0
"""Long enough for three renewals to fail."""

_INTERRUPT = signal.SIGUSR1
"""Interrupts the main thread of a run that has lost its lease. Not SIGINT, which shells ignore for ``command &``."""


def locked(directory: AnyPath) -> AbstractContextManager[None]:
    """Hold ``directory``, created if missing, for this run; call it in the main thread.

    Raises:
        UserError: another run holds it or has taken it over, or it cannot be written.
    """
    return _leased(directory) if isinstance(directory, StorePath) else run_lock.hold(directory, fcntl.flock)


def holder(directory: AnyPath) -> str | None:
    """Name the process that holds ``directory``, or None. On a store without locks a killed run still holds it."""
    if not isinstance(directory, StorePath):
        return run_lock.holder(directory)
    content = _read(directory / LEASE_FILE)
    return None if content is None else _name(_fields(content))


class _LostError(BaseException):
    """Another run has taken the lease."""


def _interrupt(*_signal: object) -> None:
    raise _LostError


@contextmanager
def _leased(directory: StorePath) -> Iterator[None]:
    lease = _Lease(directory / LEASE_FILE)
    _take(lease.path, lease.content())
    before = signal.signal(_INTERRUPT, _interrupt)
    stop = threading.Event()
    renewing = threading.Thread(target=lease.renew, args=(stop,), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    except BaseException:
        stop.set()
        if lease.lost_to is None:
            raise
        raise UserError(
            f"stopped: another run ({lease.lost_to}) took over {directory}, since this run did not renew its lease"
        ) from None
    finally:
        stop.set()
        renewing.join()
        signal.signal(_INTERRUPT, before)
        if lease.is_mine(_read(lease.path)):
            lease.path.unlink(missing_ok=True)


class _Lease:
    """This run's lease: its process, and a counter that changes with each renewal."""

    def __init__(self, path: StorePath) -> None:
        self.path = path
        self.lost_to: str | None = None
        self._run, self._number = uuid.uuid4().hex, 0

    def content(self) -> bytes:
        return json.dumps(
            {
                "host": socket.gethostname(),
                "processes": _process_namespace(),
                "process": os.getpid(),
                "run": self._run,
                "number": self._number,
            }
        ).encode()

    def is_mine(self, content: bytes | None) -> bool:
        return content is not None and _fields(content).get("run") == self._run

    def renew(self, stop: threading.Event) -> None:
        """Rewrite the lease until ``stop``; interrupt the main thread if another run has taken it."""
        while not stop.wait(_RENEWED_SECONDS):
            # The next renewal may succeed; if the store stays away, the run's own writes fail.
            with suppress(UserError, OSError):
                content = _read(self.path)
                if not self.is_mine(content):
                    self.lost_to = "which has ended" if content is None else _name(_fields(content))
                    break
                self._number += 1
                self.path.overwrite(self.content())
        while self.lost_to is not None and not stop.is_set():
            # Repeated: Python drops the exception if the signal arrives while a finalizer runs.
            os.kill(os.getpid(), _INTERRUPT)
            stop.wait(4 * _RENEWED_SECONDS)


def _take(path: StorePath, content: bytes) -> None:
    """Create the object at ``path``, or replace that of a killed run.

    Raises:
        UserError: it belongs to a running process.
    """
    while not path.create(content):
        stale = _stale_content(path)
        if stale is None:
            continue
        # The claim is itself taken like a lease. Its name is that of a temporary, so that one left by a kill is removed
        # with the others.
        claim = path.parent / f"{path.name}.tmp"
        _take(claim, content)
        try:
            # An earlier holder of the claim may have replaced the lease already.
            if _read(path) == stale:
                path.overwrite(content)
                return
        finally:
            if _read(claim) == content:  # not taken over by a later run
                claim.unlink(missing_ok=True)


def _stale_content(path: StorePath) -> bytes | None:
    """Watch a lease: return its content if its run was killed, None if it disappears.

    Raises:
        UserError: it is renewed.
    """
    first = _read(path)
    if first is None or _is_dead(_fields(first)):
        return first
    until = time.monotonic() + _WATCHED_SECONDS
    while time.monotonic() < until:
        time.sleep(_WATCHED_SECONDS / 25)
        now = _read(path)
        if now is None:
            return None
        if now != first:
            raise run_lock.refusal(path.parent, _name(_fields(now)))
    return first


def _read(path: StorePath) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _fields(content: bytes) -> dict[str, object]:
    """Parse a lease; a damaged one has no fields."""
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _name(lease: dict[str, object]) -> str:
    return f"process {lease.get('process')} on {lease.get('host')}"


def _process_namespace() -> str | None:
    """Name the scope in which process ids are unique: a machine's or a container's PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _is_dead(lease: dict[str, object]) -> bool:
    """Whether the lease's process has ended; False on another machine or container, which cannot tell."""
    process, here = lease.get("process"), _process_namespace()
    if here is None or lease.get("processes") != here or not isinstance(process, int):
        return False
    if process == os.getpid():
        return True  # an earlier process had our number: the first process of each container has number 1
    try:
        os.kill(process, 0)
    except OSError as error:  # PermissionError: another user's process
        return isinstance(error, ProcessLookupError)
    return False
