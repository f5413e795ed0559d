"""Shards from a folder, or from an object store whose shards are fetched ahead of their use.

A remote directory has a local folder: manifest and index are fetched at once, tars when they are needed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from smpo_common.errors import UserError
from smpo_common.files import atomic_path, write_bytes
from smpo_common.store_path import StorePath
from smpo_schemas.manifest import MANIFEST_FILE
from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.shards.cache import ShardCache

_THREADS = 4


@dataclass(frozen=True)
class ShardSource:
    """A directory of shards, local or fetched.

    Attributes:
        name: path or URL, as given by the user.
        folder: local folder of its files.
        directory: its manifest, and its samples once they are fetched.
        remote: object store to fetch from; None for a local folder.
    """

    name: str
    folder: Path
    directory: ShardDirectory
    remote: StorePath | None


def open_source(name: str, cache: Path) -> ShardSource:
    """Open a folder, or a URL of any file system that fsspec supports, with ``cache`` for fetched files.

    Raises:
        UserError: it holds no finished shards, or the store cannot be reached.
    """
    if "://" not in name:
        return ShardSource(name, Path(name), ShardDirectory(Path(name)), None)
    remote = StorePath(name.rstrip("/"))
    # Name the local folder by the manifest: if the shards are made again, old tars in the cache must not be used.
    with tempfile.TemporaryDirectory(prefix="smpo-") as private:
        _fetch(remote, Path(private) / MANIFEST_FILE)
        manifest = (Path(private) / MANIFEST_FILE).read_bytes()
    folder = cache / hashlib.sha256(manifest).hexdigest()[:16]
    write_bytes(folder / MANIFEST_FILE, manifest)
    directory = ShardDirectory(folder)
    if directory.manifest.index:
        _fetch(remote, folder / directory.manifest.index.name)
    return ShardSource(name, folder, directory, remote)


def _fetch(directory: StorePath, target: Path) -> None:
    """Fetch the file of ``target``'s name from ``directory``, once if several processes ask for it.

    Raises:
        UserError: the file does not exist, or the store fails repeatedly.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        # Another process may have fetched it while this one waited for the lock.
        if target.is_file():
            return
        with atomic_path(target) as temporary:
            try:
                (directory / target.name).download(temporary)
            except FileNotFoundError as error:
                raise UserError(f"{directory / target.name} does not exist") from error


class ShardStore:
    """Fetches shards, verifies every byte of them, and keeps the cache within its limit."""

    def __init__(self, places: Sequence[tuple[ShardSource, int]], cache_bytes: int) -> None:
        """Serve shards.

        Args:
            places: (source, number within the source) of every shard.
            cache_bytes: limit for the fetched shards of all runs, which shards in use may exceed.
        """
        self._places = places
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._ready: dict[int, Future[None]] = {}
        caches = [source.folder.parent for source, _ in places if source.remote]
        self._cache = ShardCache(caches[0], cache_bytes) if caches else None

    def prefetch(self, shards: Iterable[int]) -> None:
        """Start to fetch and verify shards that will be needed."""
        new = [shard for shard in shards if shard not in self._ready]
        # Tell the cache before fetching, or another run could remove a shard as soon as it is complete.
        if new:
            self._use([*self._ready, *new])
        for shard in new:
            self._ready[shard] = self._pool.submit(self._fetch_and_verify, shard)

    def wait_for(self, shards: Iterable[int]) -> None:
        """Wait until shards are fetched and verified.

        Raises:
            UserError: one is missing or damaged.
        """
        needed = list(shards)
        self.prefetch(needed)
        for shard in needed:
            self._ready[shard].result()  # raises the error of the fetch

    def release(self, in_use: Iterable[int]) -> None:
        """Release all fetched shards but those in use; the cache may remove them, and they are verified again later."""
        used = set(in_use)
        for shard, future in list(self._ready.items()):
            if self._places[shard][0].remote and shard not in used and future.done():
                del self._ready[shard]
        if self._cache:
            self._use(self._ready)
            self._cache.trim()

    def close(self) -> None:
        """Cancel pending fetches and release all shards."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._cache:
            self._cache.close()

    def _use(self, shards: Iterable[int]) -> None:
        if self._cache:
            self._cache.use(self._path(shard) for shard in shards if self._places[shard][0].remote)

    def _path(self, shard: int) -> Path:
        source, number = self._places[shard]
        return source.folder / source.directory.manifest.shards[number].name

    def _fetch_and_verify(self, shard: int) -> None:
        source, number = self._places[shard]
        if source.remote is None:
            source.directory.verify(number)
            return
        path = self._path(shard)
        _fetch(source.remote, path)
        try:
            source.directory.verify(number)
        except UserError:
            path.unlink(missing_ok=True)  # perhaps only the copy is damaged: let the next run fetch it again
            raise
        with suppress(OSError):  # the file may belong to another user
            os.utime(path)  # the cache keeps the most recently used shards
