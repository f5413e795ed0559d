"""One run at a time in a directory: a lock, or on object storage, which has none, a lease."""

from __future__ import annotations

import fcntl
from contextlib import AbstractContextManager

from smpo_common.run_lock import LOCK_FILE, NO_LOCKS, hold, holder_of, is_lock
from smpo_common.store_path import AnyPath, StorePath
from smpo_pipeline.jobs.record.lease import lease_holder, leased


def locked(directory: AnyPath) -> AbstractContextManager[None]:
    """Hold ``directory`` (made where it is missing) for this run.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    return leased(directory) if isinstance(directory, StorePath) else hold(directory, fcntl.flock)


def refuse_unknown_bucket(directory: AnyPath) -> None:
    """Ask an object store for ``directory``, before work that would be lost.

    Raises:
        UserError: there is no such bucket, or the store cannot be reached.
    """
    directory.exists()


def holder(directory: AnyPath) -> str | None:
    """Who holds ``directory``, in words, or None; without locks also a run that was killed and not followed."""
    if isinstance(directory, StorePath):
        return lease_holder(directory)
    path = directory / LOCK_FILE
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return holder_of(path) if is_lock(file.fileno()) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        if isinstance(error, BlockingIOError) or error.errno in NO_LOCKS:
            return holder_of(path)
        raise
