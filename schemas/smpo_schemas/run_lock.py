"""One run at a time in a directory of this machine's file systems.

The lock is the kernel's, not the file: it ends with the process that holds it, however that ends, so that a killed run
blocks nobody. Between machines it holds where the file system carries such locks (NFS 4, Lustre and GPFS so mounted).
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smpo_schemas.errors import UserError

LOCK_FILE = ".lock"


@contextmanager
def hold(directory: Path, lock: Callable[[int, int], object]) -> Iterator[None]:
    """Hold ``directory`` (made where it is missing) for this run.

    Args:
        directory: nobody else may write it meanwhile.
        lock: ``fcntl.flock``, or ``fcntl.lockf`` for a process that forks: its children inherit flock's locks, and may
            live on for seconds where it is killed. Nothing else in that process may open the file then: closing it
            would end the lock.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    path = directory / LOCK_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _lock_current(path, lock)
    except BlockingIOError:
        raise UserError(
            f"{directory} is being written by another run ({holder_of(path)}): wait for it, or take another --out"
        ) from None
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def holder_of(path: Path) -> str:
    """Who says, in a locked file, that it is theirs."""
    try:
        return path.read_text(encoding="utf-8") or "which has just begun"
    except OSError:
        return "which is just ending"


def _lock_current(path: Path, lock: Callable[[int, int], object]) -> int:
    """Lock the file that stands at ``path``: who had it before may have removed it while we were opening it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
