"""Shards from an object store, with fsspec's in-memory file system in its place."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import tenacity
from fsspec.implementations.memory import MemoryFileSystem

from smpo_common import store_path
from smpo_common.errors import UserError
from smpo_common.store_path import StorePath
from smpo_trainer.shards.fetch import ShardStore
from smpo_trainer.shards.shard_set import ShardSet, open_shards
from tests.trainer.conftest import Train
from tests.trainer.helpers import column

URL = "memory://bucket/shards"


class Flaky(MemoryFileSystem):
    """A file system that fails every other time."""

    protocol = "flaky"
    cachable = False
    failures = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def get_file(self, *args: object, **kwargs: object) -> None:
        Flaky.failures += 1
        if Flaky.failures % 2:
            raise ConnectionResetError("reset by peer")
        super().get_file(*args, **kwargs)


@pytest.fixture
def bucket(shards: Path) -> Iterator[MemoryFileSystem]:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket/shards", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


def opened(cache: Path, url: str = URL) -> ShardSet:
    return open_shards([url], cache)


def tars(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("shard-*.tar")}


@pytest.mark.slow
def test_training_from_a_url_equals_training_from_a_folder(train: Train, tmp_path: Path, bucket: object) -> None:
    local = train("local", max_steps=9, beta=200, lr=1e-5)
    options = {"cache": tmp_path / "cache", "workers": 2, "shuffle_window": 1, "max_steps": 9, "beta": 200, "lr": 1e-5}
    remote = train("remote", on=URL, **options)
    windowed = train("windowed", **options)
    assert column(remote, "loss") == column(windowed, "loss")
    assert column(local, "loss") != column(windowed, "loss")  # another window gives another order
    assert tars(tmp_path / "cache") == {"shard-000000.tar", "shard-000001.tar"}


def test_only_needed_shards_are_fetched(tmp_path: Path, bucket: object) -> None:
    shard_set = opened(tmp_path)
    assert sum(1 for _ in shard_set.trajectories()) == 6
    assert tars(tmp_path) == set()
    store = ShardStore(shard_set.places, cache_bytes=1 << 30)
    store.wait_for([1])
    assert tars(tmp_path) == {"shard-000001.tar"}


def test_the_cache_keeps_its_limit_and_shards_in_use(tmp_path: Path, bucket: object) -> None:
    store = ShardStore(opened(tmp_path).places, cache_bytes=1)
    store.wait_for([0, 1])
    store.release([1])
    assert tars(tmp_path) == {"shard-000001.tar"}
    store.wait_for([0])
    assert tars(tmp_path) == {"shard-000000.tar", "shard-000001.tar"}


def test_transient_failures_are_retried(
    tmp_path: Path, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(store_path._RETRY, "wait", tenacity.wait_none())
    shard_set = opened(tmp_path, "flaky://bucket/shards")
    ShardStore(shard_set.places, cache_bytes=1 << 30).wait_for([0, 1])
    assert len(tars(tmp_path)) == 2


def test_a_damaged_copy_is_named_and_not_kept(tmp_path: Path, bucket: MemoryFileSystem) -> None:
    name = "/bucket/shards/shard-000000.tar"
    whole = bucket.cat_file(name)
    bucket.pipe_file(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"shard-000000\.tar differs from the SHA-256"):
        ShardStore(opened(tmp_path).places, cache_bytes=1 << 30).wait_for([0, 1])
    bucket.pipe_file(name, whole)
    ShardStore(opened(tmp_path).places, cache_bytes=1 << 30).wait_for([0])


def test_a_missing_shard_is_named(tmp_path: Path, bucket: MemoryFileSystem) -> None:
    bucket.rm_file("/bucket/shards/shard-000001.tar")
    with pytest.raises(UserError, match=r"shard-000001\.tar does not exist"):
        ShardStore(opened(tmp_path).places, cache_bytes=1 << 30).wait_for([0, 1])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://bucket/nothing", "manifest.json does not exist"),
        ("nosuch://bucket/x", "nosuch://bucket/x/manifest.json: Protocol not known"),
    ],
)
def test_a_wrong_url_is_one_line(tmp_path: Path, bucket: object, url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path, url)


def store_of(cache: Path, cache_bytes: int = 1) -> ShardStore:
    """The store of another run or process."""
    return ShardStore(opened(cache).places, cache_bytes)


def test_shards_in_use_by_another_run_are_kept(tmp_path: Path, bucket: object) -> None:
    one, other = store_of(tmp_path), store_of(tmp_path)
    one.wait_for([0])
    other.wait_for([0, 1])
    one.release([])
    assert tars(tmp_path) == {"shard-000000.tar", "shard-000001.tar"}
    other.release([1])
    assert tars(tmp_path) == {"shard-000001.tar"}
    other.close()
    one.release([])
    assert tars(tmp_path) == set()


def test_shards_being_fetched_by_another_run_are_kept(
    tmp_path: Path, bucket: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    copy = StorePath.download

    def slowly(self: StorePath, temporary: Path) -> None:
        copy(self, temporary)
        begun.set()
        go_on.wait(30)

    one, other = store_of(tmp_path), store_of(tmp_path)
    monkeypatch.setattr(StorePath, "download", slowly)
    other.prefetch([0])
    assert begun.wait(30)
    one.release([])
    go_on.set()
    other.wait_for([0])
    assert tars(tmp_path) == {"shard-000000.tar"}


def test_the_limit_is_shared_and_least_recently_used_shards_are_removed_first(tmp_path: Path, bucket: object) -> None:
    sizes = [entry.bytes for entry in opened(tmp_path).directories[0].manifest.shards]
    for shard in (1, 0, 1):  # three runs in turn
        one = store_of(tmp_path, sum(sizes))
        one.wait_for([shard])
        one.release([])
        one.close()
    assert tars(tmp_path) == {"shard-000000.tar", "shard-000001.tar"}
    store_of(tmp_path, sizes[1]).release([])
    assert tars(tmp_path) == {"shard-000001.tar"}


def test_leftovers_of_a_killed_run_are_counted_and_removed(tmp_path: Path, bucket: object) -> None:
    killed = f"""
import os, signal
from pathlib import Path
from smpo_trainer.shards.cache import ShardCache
cache = ShardCache(Path({str(tmp_path)!r}), 1)
folder = Path({str(tmp_path)!r}) / "0123456789abcdef"
folder.mkdir(parents=True)
for name in ("shard-000007.tar", ".shard-000008.tar.0123.tmp"):
    (folder / name).write_bytes(bytes(1000))
cache.use([folder / "shard-000007.tar", folder / "shard-000008.tar"])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert tars(tmp_path) == {"shard-000007.tar"}
    store = store_of(tmp_path, 1 << 30)
    store.release([])  # within the limit, but partial files are always removed
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
    assert tars(tmp_path) == {"shard-000007.tar"}
    store_of(tmp_path, 999).release([])
    assert tars(tmp_path) == set()
    assert len(list(tmp_path.glob(".uses-*"))) == 2


def test_files_that_the_cache_did_not_fetch_are_left_alone(tmp_path: Path, bucket: object) -> None:
    own = [tmp_path / "laion" / name for name in ("00000.tar", ".00001.tar.0123.tmp")]
    own[0].parent.mkdir()
    for path in own:
        path.write_bytes(bytes(1000))
    store = store_of(tmp_path)
    store.wait_for([0, 1])
    store.release([])
    assert tars(tmp_path) == set()
    assert all(path.is_file() for path in own)


def test_concurrent_opening_reads_complete_manifests(tmp_path: Path, shards: Path) -> None:
    """By many threads, from a file system that, unlike the in-memory one, allows concurrent reads."""
    with ThreadPoolExecutor(16) as pool:
        opened_sets = list(pool.map(lambda _: opened(tmp_path, f"file://{shards}"), range(200)))
    assert len({shard_set.sources[0].folder for shard_set in opened_sets}) == 1


def test_another_manifest_is_another_folder(tmp_path: Path, bucket: MemoryFileSystem) -> None:
    first = opened(tmp_path).sources[0].folder
    manifest = bucket.cat_file("/bucket/shards/manifest.json")
    bucket.pipe_file("/bucket/shards/manifest.json", manifest.replace(b'"seed": 0', b'"seed": 1'))
    second = opened(tmp_path).sources[0]
    assert second.folder != first
    assert second.directory.manifest.seed == 1
