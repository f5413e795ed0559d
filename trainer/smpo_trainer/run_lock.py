"""One run at a time in an output folder.

The lock is the kernel's, and of the process alone (fcntl's): it ends with the process, however that ends. Loader
processes would inherit flock's, which filelock takes, and live on for seconds after a run that is killed. No other part
of the process may open the file: closing it ends such a lock.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smpo_schemas.errors import UserError

_FILE = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold ``out`` (made where it is missing) for this run.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    path = out / _FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = _lock_current(path)
    except BlockingIOError:
        raise UserError(
            f"--out {out} is being written by another run ({_holder(path)}): wait for it, or take another --out"
        ) from None
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock_current(path: Path) -> int:
    """Lock the file that stands at ``path``: who had it before may have removed it while we were opening it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "which has just begun"
    except OSError:
        return "which is just ending"
