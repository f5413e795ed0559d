"""Shards from a folder, or from an object store whose shards are fetched ahead of their use.

A remote directory has a local folder: manifest and indexes are fetched at once, tars and the files of stored text when
they are needed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from smpo_common.errors import UserError
from smpo_common.files import atomic_path, write_bytes
from smpo_common.store_path import StorePath
from smpo_schemas.manifest import MANIFEST_FILE, TEXT_FOLDER, TextFile
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.text import verify_text
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
    if directory.manifest.text:
        _fetch(remote / TEXT_FOLDER, folder / TEXT_FOLDER / directory.manifest.text.index.name)
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


@dataclass(frozen=True)
class _File:
    """A shard, or a file of stored text.

    Attributes:
        source: the source that the file belongs to.
        folder: its folder within the source, "" or ``text``.
        name: its name.
        verify: checks its size and SHA-256.
    """

    source: ShardSource
    folder: str
    name: str
    verify: Callable[[], None]

    @property
    def path(self) -> Path:
        return self.source.folder / self.folder / self.name

    def fetch(self) -> None:
        """Fetch it, unless it is there."""
        if self.source.remote:
            _fetch(self.source.remote / self.folder if self.folder else self.source.remote, self.path)

    @classmethod
    def of_shard(cls, source: ShardSource, number: int) -> _File:
        directory = source.directory
        return cls(source, "", directory.manifest.shards[number].name, partial(directory.verify, number))

    @classmethod
    def of_text(cls, source: ShardSource, entry: TextFile) -> _File:
        return cls(source, TEXT_FOLDER, entry.name, partial(verify_text, source.folder / TEXT_FOLDER, entry))


class ShardStore:
    """Fetches shards and stored text, verifies every byte, and keeps the cache within its limit.

    Files have one numbering: first all shards, then the files of stored text.
    """

    def __init__(
        self,
        places: Sequence[tuple[ShardSource, int]],
        cache_bytes: int,
        text_files: Sequence[tuple[ShardSource, TextFile]] = (),
    ) -> None:
        """Serve files.

        Args:
            places: (source, number within the source) of every shard.
            cache_bytes: limit for the fetched files of all runs, which files in use may exceed.
            text_files: source, and entry in its manifest, of every file of stored text.
        """
        self._files = [_File.of_shard(*place) for place in places] + [_File.of_text(*place) for place in text_files]
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shards")
        self._ready: dict[int, Future[None]] = {}
        caches = [source.folder.parent for source, _ in places if source.remote]
        self._cache = ShardCache(caches[0], cache_bytes) if caches else None

    def prefetch(self, files: Iterable[int]) -> None:
        """Start to fetch and verify files that will be needed."""
        new = [number for number in files if number not in self._ready]
        # Tell the cache before fetching, or another run could remove a file as soon as it is complete.
        if new:
            self._use([*self._ready, *new])
        for number in new:
            self._ready[number] = self._pool.submit(self._fetch_and_verify, self._files[number])

    def wait_for(self, files: Iterable[int]) -> None:
        """Wait until files are fetched and verified.

        Raises:
            UserError: one is missing or damaged.
        """
        needed = list(files)
        self.prefetch(needed)
        for number in needed:
            self._ready[number].result()  # raises the error of the fetch

    def release(self, in_use: Iterable[int]) -> None:
        """Release all fetched files but those in use; the cache may remove them, and they are verified again later."""
        used = set(in_use)
        for number, future in list(self._ready.items()):
            if self._files[number].source.remote and number not in used and future.done():
                del self._ready[number]
        if self._cache:
            self._use(self._ready)
            self._cache.trim()

    def close(self) -> None:
        """Cancel pending fetches and release all files."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._cache:
            self._cache.close()

    def _use(self, numbers: Iterable[int]) -> None:
        if self._cache:
            files = (self._files[number] for number in numbers)
            self._cache.use(file.path for file in files if file.source.remote)

    @staticmethod
    def _fetch_and_verify(file: _File) -> None:
        file.fetch()
        try:
            file.verify()
        except UserError:
            if file.source.remote:
                file.path.unlink(missing_ok=True)  # perhaps only the copy is damaged: let the next run fetch it again
            raise
        if file.source.remote:
            with suppress(OSError):  # the file may belong to another user
                os.utime(file.path)  # the cache keeps the most recently used files
