"""A folder of fetched shards, shared by all runs and processes of a machine, with a size limit.

Each process lists the shards it uses in a file of its own, which it keeps locked (flock). The kernel releases the lock
with the process, so that the shards of a killed run can be removed. Shards in use are never removed.
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
from smpo_schemas.manifest import TEXT_FOLDER

_LOCK = ".lock"
"""Held while a process changes its list of used shards, and while shards are removed."""

# Not a lock per shard: a window of small shards would keep a thousand files open. Not on the tars themselves: loader
# processes would inherit the locks and keep their space taken.
_USES = ".uses-"
_FOLDERS = "[0-9a-f]" * 16
"""Pattern of the folder names of :func:`smpo_trainer.shards.fetch.open_source`. Nothing else in the cache folder, which
may contain files of the user, is counted or removed."""

_FETCHED = ("", "*.tar"), (f"{TEXT_FOLDER}/", "text-*.safetensors")
"""Subfolder and pattern of the files that are fetched when they are needed: shards, and files of stored text."""

_PARTIAL = ".tmp"
"""Suffix of a shard that is not fetched completely, perhaps because the run was killed."""


class ShardCache:
    """The shared folder, and the shards in it that this process uses."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Use ``folder`` with a limit of ``max_bytes``, which shards in use may exceed."""
        self._folder, self._max_bytes = folder, max_bytes
        self._uses: BinaryIO | None = None

    def use(self, shards: Iterable[Path]) -> None:
        """Set the shards that this process uses from now on, whether they are fetched already or not.

        Raises:
            UserError: the folder cannot be written.
        """
        with self._locked():
            if self._uses is None:
                self._uses = (self._folder / f"{_USES}{uuid.uuid4().hex}").open("wb", buffering=0)
                # Kept until close() or the end of the process.
                fcntl.flock(self._uses, fcntl.LOCK_EX)
            self._uses.seek(0)
            self._uses.truncate()
            self._uses.write("\n".join(str(path.relative_to(self._folder)) for path in shards).encode())

    def trim(self) -> None:
        """Remove unused shards, least recently used first, until the limit holds.

        Raises:
            UserError: a file cannot be removed.
        """
        with self._locked():
            used = self._used()
            files = sorted(self._files(), key=lambda file: file[1].st_mtime)
            total = sum(status.st_size for _, status in files)
            for path, status in files:
                # If the shard is unused, no process is fetching it any more.
                is_partial = path.name.endswith(_PARTIAL)
                if _shard_of(path) not in used and (is_partial or total > self._max_bytes):
                    path.unlink(missing_ok=True)
                    total -= status.st_size

    def close(self) -> None:
        """Release all shards."""
        if self._uses is not None:
            Path(os.fsdecode(self._uses.name)).unlink(missing_ok=True)
            # Unlock explicitly: loader processes have inherited the file, so closing it would not release the lock.
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
        """Return the shards that living processes use, including this one; remove the lists of dead ones."""
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

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield fetched shards and partial ones, with their status."""
        patterns = [
            f"{_FOLDERS}/{below}{name}" for below, pattern in _FETCHED for name in (pattern, f".{pattern}.*{_PARTIAL}")
        ]
        for path in (path for pattern in patterns for path in self._folder.glob(pattern)):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # renamed after its fetch, or removed because it is damaged
                continue


def _shard_of(path: Path) -> Path:
    """Return the shard of a file; partial ones are named by :func:`smpo_common.files.atomic_path`."""
    return path.with_name(path.name[1:].rsplit(".", 2)[0]) if path.name.endswith(_PARTIAL) else path
