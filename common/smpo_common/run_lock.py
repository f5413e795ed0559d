"""Let one run at a time write into a directory of a mounted file system.

The lock is the kernel's (flock or lockf): it ends with its process, so that a killed run does not block the next one.
It works between machines where the file system supports it (NFS 4, Lustre and GPFS mounted for it). On a file system
without locks the file itself is the lock: only one run can create it, and a killed run leaves it behind.
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
"""Errors of a file system without locks."""

_BY_FILE = "by this file alone"
"""Text in a lock file whose existence is the lock."""


class _HeldByFileError(Exception):
    """The lock file exists, and its existence is the lock."""


@contextmanager
def hold(directory: Path, lock: Callable[[int, int], object]) -> Iterator[None]:
    """Lock ``directory`` for this run; create it if it is missing.

    Args:
        directory: where the run writes.
        lock: ``fcntl.flock``, or ``fcntl.lockf`` for a process that forks: its children inherit flock's locks and may
            outlive it by seconds where it is killed. With lockf nothing else in the process may open the file: closing
            it would release the lock.

    Raises:
        UserError: another run holds the lock, or the directory cannot be written.
    """
    path = directory / LOCK_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _lock_current(path, lock)
    except BlockingIOError:
        raise refusal(directory, _owner(path)) from None
    except _HeldByFileError:
        raise UserError(
            f"{path} says that another run ({_owner(path)}) writes to this folder. Wait for it; if it is no longer "
            "running, delete that file (this file system has no locks, so a killed run leaves it behind)"
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
    """Name the process that holds ``directory``, or None. Without file system locks, it may have been killed."""
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
    """Make the error that another run is writing into ``directory``."""
    return UserError(f"{directory} is being written by another run ({owner}): wait for it, or choose another --out")


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "just started"
    except OSError:
        return "just ending"


def _is_lock(descriptor: int) -> bool:
    """Whether the file's existence is the lock, rather than the kernel's lock on it."""
    return _BY_FILE.encode() in os.pread(descriptor, 1000, 0)


def _lock_current(path: Path, lock: Callable[[int, int], object]) -> int:
    """Lock the file at ``path`` and write this process's name into it.

    Raises:
        _HeldByFileError: the file itself is the lock, of another run or of a killed one.
    """
    while True:  # until the locked file is the one at path: the last holder may remove it after we opened it
        descriptor, created = _open(path)
        try:
            by_file = not _locked(descriptor, lock)
            if not created and (by_file or _is_lock(descriptor)):
                raise _HeldByFileError
            if _is_at(path, descriptor):
                suffix = f", {_BY_FILE}" if by_file else ""
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}{suffix}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    """Open or create the file; the flag tells whether this call created it."""
    while True:  # another run may remove it between the two attempts
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR), False


def _locked(descriptor: int, lock: Callable[[int, int], object]) -> bool:
    """Lock a file; return False if the file system has no locks."""
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
