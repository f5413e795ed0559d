"""One run at a time in a directory on an object store, which knows no locks.

A run creates an object that only one can create, and writes it anew every few seconds. Whoever finds such an object
watches it: one that changes belongs to a run that lives, one that does not was left by a run that was killed. No clock
is compared with another machine's. Two who find the same dead lease at the same moment can both take it over; that one
case is left open.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from smpo_schemas.errors import UserError
from smpo_schemas.store import StorePath

LEASE_FILE = ".lease"

_RENEWED_SECONDS = 15.0
_WATCHED_SECONDS = 50.0
"""Three renewals may fail."""


@contextmanager
def leased(directory: StorePath) -> Iterator[None]:
    """Hold ``directory`` for this run.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    path = directory / LEASE_FILE
    lease = _Lease(path)
    if not path.create(lease.content()):
        _refuse_if_held(path)
        path.overwrite(lease.content())
    stop = threading.Event()
    renewing = threading.Thread(target=lease.renew, args=(stop,), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join()
        path.unlink(missing_ok=True)


def lease_holder(directory: StorePath) -> str | None:
    """Whose lease is there, or None; the run may have been killed."""
    found = _read(directory / LEASE_FILE)
    return None if found is None else _words(found)


def _words(lease: dict[str, object]) -> str:
    return f"process {lease.get('process')} on {lease.get('host')}"


class _Lease:
    """The object's content: who holds it, and a number that rises."""

    def __init__(self, path: StorePath) -> None:
        self._path, self._token, self._number = path, uuid.uuid4().hex, 0

    def content(self) -> bytes:
        holder = {"host": socket.gethostname(), "process": os.getpid(), "run": self._token, "number": self._number}
        return json.dumps(holder).encode()

    def renew(self, stop: threading.Event) -> None:
        while not stop.wait(_RENEWED_SECONDS):
            self._number += 1
            # What fails for long ends the run elsewhere; the next renewal may succeed.
            with suppress(UserError, OSError):
                self._path.overwrite(self.content())


def _refuse_if_held(path: StorePath) -> None:
    """Watch a lease that is there.

    Raises:
        UserError: it is renewed.
    """
    first = _read(path)
    if first is None or _is_of_a_dead_process_here(first):
        return
    until = time.monotonic() + _WATCHED_SECONDS
    while time.monotonic() < until:
        time.sleep(_WATCHED_SECONDS / 25)
        now = _read(path)
        if now is None:
            return
        if now != first:
            raise UserError(
                f"{path.parent} is being written by another run ({_words(now)}): wait for it, or take another --out"
            )


def _read(path: StorePath) -> dict[str, object] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _is_of_a_dead_process_here(lease: dict[str, object]) -> bool:
    process = lease.get("process")
    if lease.get("host") != socket.gethostname() or not isinstance(process, int):
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
