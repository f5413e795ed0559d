"""One run at a time in a directory on an object store, which knows no locks.

A run creates an object that only one can create, and writes it anew every few seconds. Whoever finds such an object
watches it: one that changes belongs to a run that lives, one that does not was left by a run that was killed. No clock
is compared with another machine's. Of several that find the same dead lease, the one that creates its heir's object
follows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smpo_common.errors import UserError
from smpo_common.store_path import StorePath

LEASE_FILE = ".lease"

_RENEWED_SECONDS = 15.0
_WATCHED_SECONDS = 50.0
"""Three renewals may fail."""

_INTERRUPT = signal.SIGUSR1
"""Interrupts the main thread of a run that has lost its lease; SIGINT is ignored in what a script runs with ``&``."""


@contextmanager
def leased(directory: StorePath) -> Iterator[None]:
    """Hold ``directory`` for this run, in the main thread.

    Raises:
        UserError: another run holds it, or has taken it over, or it cannot be written.
    """
    lease = _Lease(directory / LEASE_FILE)
    lease.take()
    before = signal.signal(_INTERRUPT, _interrupt)
    stop = threading.Event()
    renewing = threading.Thread(target=lease.renew, args=(stop,), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    except BaseException:
        stop.set()
        if lease.follower is None:
            raise
        raise UserError(
            f"stopped: another run ({lease.follower}) took {directory} over, since this one could not be seen any more"
        ) from None
    finally:
        stop.set()
        renewing.join()
        signal.signal(_INTERRUPT, before)
        lease.give_back()


def lease_holder(directory: StorePath) -> str | None:
    """Whose lease is there, or None; the run may have been killed."""
    found = _read(directory / LEASE_FILE)
    return None if found is None else _words(_fields(found))


class _LostError(BaseException):
    """The lease is another run's."""


def _interrupt(*_signal: object) -> None:
    raise _LostError


class _Lease:
    """The object's content: who holds it, and a number that rises.

    Attributes:
        follower: who took it over from this run, in words.
    """

    def __init__(self, path: StorePath) -> None:
        self.follower: str | None = None
        self._path, self._token, self._number = path, uuid.uuid4().hex, 0

    def take(self) -> None:
        """Create it, or follow a run that was killed.

        Raises:
            UserError: a run that lives holds it.
        """
        _take(self._path, self._content())

    def renew(self, stop: threading.Event) -> None:
        """Write it anew again and again; where it is another's, interrupt the main thread."""
        while not stop.wait(_RENEWED_SECONDS):
            # What fails for long ends the run elsewhere; the next renewal may succeed.
            with suppress(UserError, OSError):
                found = _read(self._path)
                if found is None or not self._is_mine(found):
                    self.follower = "which has ended" if found is None else _words(_fields(found))
                    os.kill(os.getpid(), _INTERRUPT)
                    # Python drops what is raised in a finalizer that happens to run: then once more.
                    while not stop.wait(4 * _RENEWED_SECONDS):
                        os.kill(os.getpid(), _INTERRUPT)
                    return
                self._number += 1
                self._path.overwrite(self._content())

    def give_back(self) -> None:
        """Remove it, unless it is another's."""
        found = _read(self._path)
        if found is not None and self._is_mine(found):
            self._path.unlink(missing_ok=True)

    def _is_mine(self, content: bytes) -> bool:
        return _fields(content).get("run") == self._token

    def _content(self) -> bytes:
        holder = {
            "host": socket.gethostname(),
            "processes": _processes(),
            "process": os.getpid(),
            "run": self._token,
            "number": self._number,
        }
        return json.dumps(holder).encode()


def _take(path: StorePath, content: bytes) -> None:
    """Create the object at ``path``, or replace what a run that was killed left there.

    Raises:
        UserError: it is another run's that lives.
    """
    while not path.create(content):
        dead = _left_behind(path)
        if dead is None:
            continue
        # A temporary by its name: one that a kill leaves is removed with the others.
        heir = path.parent / f"{LEASE_FILE}-{hashlib.sha256(dead).hexdigest()[:32]}.tmp"
        _take(heir, content)
        try:
            # Whoever was the heir before may have been done with it by now.
            if _read(path) == dead:
                path.overwrite(content)
                return
        finally:
            heir.unlink(missing_ok=True)


def _left_behind(path: StorePath) -> bytes | None:
    """Watch a lease that is there: what it holds if its run was killed, None if it goes.

    Raises:
        UserError: it is renewed.
    """
    first = _read(path)
    if first is None or _is_of_a_dead_process_here(_fields(first)):
        return first
    until = time.monotonic() + _WATCHED_SECONDS
    while time.monotonic() < until:
        time.sleep(_WATCHED_SECONDS / 25)
        now = _read(path)
        if now is None:
            return None
        if now != first:
            holder = _words(_fields(now))
            raise UserError(
                f"{path.parent} is being written by another run ({holder}): wait for it, or take another --out"
            )
    return first


def _read(path: StorePath) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _fields(content: bytes) -> dict[str, object]:
    """What a lease says, nothing where it is damaged."""
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _words(lease: dict[str, object]) -> str:
    return f"process {lease.get('process')} on {lease.get('host')}"


def _processes() -> str | None:
    """What process numbers are unique in: containers may share a host's name and not its processes, or the reverse."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _is_of_a_dead_process_here(lease: dict[str, object]) -> bool:
    process, here = lease.get("process"), _processes()
    if here is None or lease.get("processes") != here or not isinstance(process, int):
        return False
    if process == os.getpid():
        return True  # of an earlier process with this one's number, as the first of a container has
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
