"""One run at a time in a directory of this machine's file systems.

The lock is the kernel's, not the file: it ends with the process that holds it, however that ends, so that a killed run
blocks nobody. Between machines it holds where the file system carries such locks (NFS 4, Lustre and GPFS so mounted).
Where a file system has none, the file itself is the lock, which only one run can create; a killed run leaves it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smpo_common.errors import UserError

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that has no locks."""

_BY_FILE = "by this file alone"


class _HeldByFileError(Exception):
    """The file is the lock, and was there."""


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
        raise refusal(directory, _owner(path)) from None
    except _HeldByFileError:
        raise UserError(
            f"{path}: another run ({_owner(path)}) writes here, or was killed, which cannot be told without the "
            "file system's locks: wait for it, or, if it is gone, remove that file"
        ) from None
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def holder(directory: Path) -> str | None:
    """Name the process that holds ``directory``, or None; where the file is the lock, also one that was killed."""
    path = directory / LOCK_FILE
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return _owner(path) if _is_lock(file.fileno()) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error, BlockingIOError) or error.errno in _NO_LOCKS:
            return _owner(path)
        raise


def refusal(directory: object, owner: str) -> UserError:
    """Say that another run writes into ``directory``."""
    return UserError(f"{directory} is being written by another run ({owner}): wait for it, or take another --out")


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "which has just begun"
    except OSError:
        return "which is just ending"


def _is_lock(descriptor: int) -> bool:
    """Whether a file that the kernel does not hold locked is a lock by being there."""
    return _BY_FILE.encode() in os.pread(descriptor, 1000, 0)


def _lock_current(path: Path, lock: Callable[[int, int], object]) -> int:
    """Lock the file that stands at ``path``: who had it before may have removed it while we were opening it.

    Raises:
        _HeldByFileError: it is the lock itself, another run's or a killed one's.
    """
    while True:
        descriptor, created = _open(path)
        try:
            by_file = not _locked(descriptor, lock)
            if not created and (by_file or _is_lock(descriptor)):
                raise _HeldByFileError
            if _is_at(path, descriptor):
                how = f", {_BY_FILE}" if by_file else ""
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}{how}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """The file, and whether it was made here."""
    while True:
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR), False


def _locked(descriptor: int, lock: Callable[[int, int], object]) -> bool:
    """Lock a file; False where the file system has no locks."""
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
