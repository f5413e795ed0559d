"""A folder of fetched shards that all runs and processes of a machine share, kept within a bound.

Each process says which shards it uses, in a file of its own that it holds locked (flock): the kernel ends that lock
with the process, so that what a killed run used can go. Nothing that a living process uses is ever removed.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from smpo_common.errors import UserError

_LOCK = ".lock"
"""Held while somebody says what is used, and while something is removed."""

# Not a lock per shard: a window of small shards would keep a thousand files open. Not on the tars themselves: loader
# processes would inherit the locks and keep their space taken.
_USES = ".uses-"
_FOLDERS = "[0-9a-f]" * 16
"""Matches what :func:`smpo_trainer.shards.fetch.open_source` calls the folder of a directory of shards; nothing else
below the cache, which may be a folder with files of the user's own, is counted or removed."""

_PARTIAL = ".tmp"
"""Ends the name of what is not fetched completely, perhaps by a run that was killed."""


class ShardCache:
    """What this process uses of the folder, and what there is."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Share ``folder``, whose shards may take ``most_bytes``; those in use may take more."""
        self._folder, self._most_bytes = folder, most_bytes
        self._uses: BinaryIO | None = None

    def use(self, shards: Iterable[Path]) -> None:
        """Say which shards this process uses from now on, whether they are there already or not.

        Raises:
            UserError: the folder cannot be written.
        """
        with self._locked():
            if self._uses is None:
                self._uses = (self._folder / f"{_USES}{uuid.uuid4().hex}").open("wb", buffering=0)
                fcntl.flock(self._uses, fcntl.LOCK_EX)
            self._uses.seek(0)
            self._uses.truncate()
            self._uses.write("\n".join(str(path.relative_to(self._folder)) for path in shards).encode())

    def trim(self) -> None:
        """Remove what nobody uses, of the longest unused first, until the bound is kept.

        Raises:
            UserError: something cannot be removed.
        """
        with self._locked():
            used = self._used()
            found = sorted(self._found(), key=lambda each: each[1].st_mtime)
            total = sum(status.st_size for _, status in found)
            for path, status in found:
                partial = path.name.endswith(_PARTIAL)  # of a shard that nobody uses: nobody is fetching it
                if _shard_of(path) not in used and (partial or total > self._most_bytes):
                    path.unlink(missing_ok=True)
                    total -= status.st_size

    def close(self) -> None:
        """Use nothing any more."""
        if self._uses is not None:
            Path(os.fsdecode(self._uses.name)).unlink(missing_ok=True)
            # Closing would leave the lock to the loader processes, which have inherited the file.
            fcntl.flock(self._uses, fcntl.LOCK_UN)
            self._uses.close()
            self._uses = None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / _LOCK):
                yield
        except OSError as error:
            raise UserError(f"--cache {self._folder} cannot be written: {error.strerror or error}") from error

    def _used(self) -> set[Path]:
        """What living processes use, this one included; what dead ones have left is removed."""
        used: set[Path] = set()
        for path in self._folder.glob(f"{_USES}*"):
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    used |= {self._folder / name for name in file.read().decode().splitlines()}
                else:
                    path.unlink()
        return used

    def _found(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Shards, and parts of them."""
        for path in [*self._folder.glob(f"{_FOLDERS}/*.tar"), *self._folder.glob(f"{_FOLDERS}/.*.tar.*{_PARTIAL}")]:
            try:
                yield path, path.stat()
            except FileNotFoundError:  # renamed, as it is complete, or removed, as it was found damaged
                continue


def _shard_of(path: Path) -> Path:
    """The shard that a file is, or is a part of; parts are named as :func:`smpo_common.files.atomic_path` does."""
    return path.with_name(path.name[1:].rsplit(".", 2)[0]) if path.name.endswith(_PARTIAL) else path
