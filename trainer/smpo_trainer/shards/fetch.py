"""Where shards come from: a folder, or an object store whose shards are fetched ahead of their use.

A remote directory is a local folder that fills itself: manifest and index at once, tars when they are asked for.
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
    """A directory of shards as this machine sees it.

    Attributes:
        name: path or URL, as the user gave it.
        folder: where its files lie, or will lie.
        directory: its manifest, and its samples once they are there.
        remote: where they come from; None: they are there.
    """

    name: str
    folder: Path
    directory: ShardDirectory
    remote: StorePath | None


def open_source(name: str, cache: Path) -> ShardSource:
    """Open a folder, or a URL of any file system that fsspec knows, read through ``cache``.

    Raises:
        UserError: it holds no finished shards, or the store cannot be reached.
    """
    if "://" not in name:
        return ShardSource(name, Path(name), ShardDirectory(Path(name)), None)
    remote = StorePath(name.rstrip("/"))
    # A directory that was made anew has another manifest: its tars must not be taken from what was fetched before.
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
    """Copy the file of ``target``'s name to ``target``, which is then whole; other processes may ask for the same.

    Raises:
        UserError: it is not there, or the store still fails after several attempts.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_file():
            return
        with atomic_path(target) as temporary:
            try:
                (directory / target.name).download(temporary)
            except FileNotFoundError as error:
                raise UserError(f"{directory / target.name} does not exist") from error


class ShardStore:
    """Brings shards to this machine, checks every byte of them, and keeps the cache within its bound."""

    def __init__(self, places: Sequence[tuple[ShardSource, int]], cache_bytes: int) -> None:
        """Serve shards.

        Args:
            places: of each shard its source and its number there.
            cache_bytes: what fetched shards may take, of all runs, besides those of the windows in use.
        """
        self._places = places
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._ready: dict[int, Future[None]] = {}
        fetched = [source.folder.parent for source, _ in places if source.remote]
        self._cache = ShardCache(fetched[0], cache_bytes) if fetched else None

    def expect(self, shards: Iterable[int]) -> None:
        """Begin to fetch and to check shards that will be needed."""
        new = [shard for shard in shards if shard not in self._ready]
        if new:
            self._use([*self._ready, *new])
        for shard in new:
            self._ready[shard] = self._pool.submit(self._bring, shard)

    def require(self, shards: Iterable[int]) -> None:
        """Wait until shards are here and checked.

        Raises:
            UserError: one is missing or damaged.
        """
        wanted = list(shards)
        self.expect(wanted)
        for shard in wanted:
            self._ready[shard].result()

    def release(self, in_use: Iterable[int]) -> None:
        """Let fetched shards go but those in use: they are removed when the cache needs room, or checked again."""
        kept = set(in_use)
        for shard, done in list(self._ready.items()):
            if self._places[shard][0].remote and shard not in kept and done.done():
                del self._ready[shard]
        if self._cache:
            self._use(self._ready)
            self._cache.trim()

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._cache:
            self._cache.close()

    def _use(self, shards: Iterable[int]) -> None:
        if self._cache:
            self._cache.use(self._path(shard) for shard in shards if self._places[shard][0].remote)

    def _path(self, shard: int) -> Path:
        source, number = self._places[shard]
        return source.folder / source.directory.manifest.shards[number].name

    def _bring(self, shard: int) -> None:
        source, number = self._places[shard]
        if source.remote is None:
            source.directory.verify(number)
            return
        path = self._path(shard)
        _fetch(source.remote, path)
        try:
            source.directory.verify(number)
        except UserError:
            path.unlink(missing_ok=True)  # perhaps the copy alone is damaged: the next run fetches it anew
            raise
        with suppress(OSError):  # another user's file
            os.utime(path)  # the cache keeps what was used last
