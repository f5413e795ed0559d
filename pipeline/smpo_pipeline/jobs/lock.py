"""One run at a time in a directory.

The lock is the kernel's (flock), not the file: it ends with the process that holds it, however that ends, so that a
killed run blocks nobody. Between machines it holds where the file system carries such locks (NFS 4, Lustre and GPFS so
mounted); object storage has none, and gets a lease instead (:mod:`smpo_pipeline.jobs.lease`).
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from smpo_pipeline.jobs.lease import lease_holder, leased
from smpo_schemas.errors import UserError
from smpo_schemas.store import AnyPath, StorePath

_FILE = ".lock"


def locked(directory: AnyPath) -> AbstractContextManager[None]:
    """Hold ``directory`` (made where it is missing) for this run.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    return leased(directory) if isinstance(directory, StorePath) else _flocked(directory)


def refuse_unknown_bucket(directory: AnyPath) -> None:
    """Ask an object store for ``directory``, before work that would be lost.

    Raises:
        UserError: there is no such bucket, or the store cannot be reached.
    """
    directory.exists()


def holder(directory: AnyPath) -> str | None:
    """Who holds ``directory``, in words, or None; of an object store also a run that was killed and not followed."""
    if isinstance(directory, StorePath):
        return lease_holder(directory)
    path = directory / _FILE
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(path)
    except FileNotFoundError:
        pass
    return None


@contextmanager
def _flocked(directory: Path) -> Iterator[None]:
    path = directory / _FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _open_current(path)
    except BlockingIOError:
        raise UserError(
            f"{directory} is being written by another run ({_holder(path)}): wait for it, or take another --out"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_current(path: Path) -> int:
    """Lock the file that stands at ``path``: who had it before may have removed it while we were opening it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "which has just begun"
    except OSError:
        return "which is just ending"
