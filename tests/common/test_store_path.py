"""Paths on an object store: an S3 server on loopback that works or fails."""

from __future__ import annotations

import itertools
import pickle
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity

from smpo_common import store_path as store
from smpo_common.errors import UserError
from smpo_common.files import arrow_source, atomic_path, read_json, remove_tree, sha256_file, write_bytes, write_json
from smpo_common.store_path import StorePath, parse_path
from smpo_schemas.pairs import list_pair_files
from smpo_schemas.rejects import Reject, read_rejects, write_rejects
from smpo_schemas.shards.index import indexed_trajectories, write_index, write_index_part
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.writer import ShardWriter
from tests.schemas.shards.test_samples import make_sample, write_directory
from tests.servers.object_store import Faults, object_store


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, object_store(patch.setenv) as faults:
        yield faults


@pytest.fixture
def folder(server: Faults, request, monkeypatch):
    monkeypatch.setattr(store._RETRY, "wait", tenacity.wait_fixed(0.01))
    server.every = 0
    yield StorePath(f"s3://bucket/{request.node.name}")
    server.every = 0


def test_names_are_those_of_pathlib(tmp_path: Path):
    url, path = parse_path("s3://bucket/a/b.tar.gz/"), tmp_path / "a" / "b.tar.gz"
    assert (url.name, url.suffix, url.with_suffix(".x").name) == (path.name, path.suffix, path.with_suffix(".x").name)
    assert str(url.parent / "c") == "s3://bucket/a/c"
    assert url.absolute() == url
    assert [parse_path(text) for text in ("a/b", "file:///a/b")] == [Path("a/b"), Path("/a/b")]
    assert sorted([url / "b", url / "a"]) == [url / "a", url / "b"]
    assert pickle.loads(pickle.dumps(url)) == url  # noqa: S301  (our own)


def test_write_list_read_and_remove(folder: StorePath):
    assert not folder.exists()
    assert list(folder.iterdir()) == list(folder.glob("*")) == list(folder.rglob("*")) == []
    write_json(folder / "a.json", {"x": 1})
    write_bytes(folder / "deep" / "b.bin", b"0123456789")
    assert (folder.is_dir(), folder.is_file()) == (True, False)
    assert ((folder / "a.json").is_dir(), (folder / "a.json").is_file()) == (False, True)
    assert [path.name for path in folder.iterdir()] == ["a.json", "deep"]
    assert list(folder.glob("*.json")) == [folder / "a.json"]
    assert list(folder.rglob("*.bin")) == [folder / "deep" / "b.bin"]
    assert read_json(folder / "a.json") == {"x": 1}
    assert (folder / "deep" / "b.bin").stat().st_size == 10
    with (folder / "deep" / "b.bin").open() as file:
        assert (file.seek(-3, 2), file.read(2), file.tell(), file.read(), file.read()) == (7, b"78", 9, b"9", b"")
    (folder / "a.json").unlink()
    (folder / "a.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="s3://bucket/.*a.json does not exist"):
        read_json(folder / "a.json")
    remove_tree(folder)
    remove_tree(folder)
    assert not folder.exists()


def test_hidden_objects_are_not_pair_files(folder: StorePath):
    row = pa.table({"prompt": ["a"], "image_0": ["x"], "image_1": ["y"]})
    names = ("a.parquet", ".a.parquet", ".ipynb_checkpoints/a.parquet", "train.parquet/part-0.parquet")
    for name in names:
        with atomic_path(folder / name) as temporary:
            pq.write_table(row, temporary)
    assert [file.path for file in list_pair_files([folder])] == [folder / "a.parquet", folder / names[-1]]


def test_an_unfinished_file_is_not_uploaded(folder: StorePath):
    with pytest.raises(KeyError), atomic_path(folder / "a") as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert not (folder / "a").exists()


@pytest.mark.parametrize("amazon", [True, False])
def test_create_refuses_an_existing_file_whatever_the_stores_error(folder, server: Faults, amazon):
    server.amazon = amazon
    try:
        assert (folder / "a").create(b"first")
        assert not (folder / "a").create(b"second")
        assert (folder / "a").create(b"first")  # an answer was lost
    finally:
        server.amazon = True
    assert (folder / "a").read_bytes() == b"first"


def test_create_returns_false_for_a_file_that_is_removed_meanwhile(folder: StorePath, monkeypatch):
    (folder / "a").overwrite(b"other")
    read = StorePath.read_bytes
    monkeypatch.setattr(StorePath, "read_bytes", lambda path: (path.unlink(), read(path))[1])
    assert not (folder / "a").create(b"mine")


def test_one_request_reads_size_and_time_and_one_listing_those_of_all_files(folder: StorePath, server: Faults):
    for name in ("a.json", "b.json", "c.tar", "deep/d.json"):
        write_bytes(folder / name, name.encode())
    before = server.requests
    status = (folder / "b.json").stat()
    assert server.requests - before == 1
    assert (status.st_size, abs(status.st_mtime - time.time()) < 100) == (6, True)
    before = server.requests
    assert folder.statuses("*.json") == {folder / "a.json": (folder / "a.json").stat(), folder / "b.json": status}
    assert server.requests - before == 2  # the listing, and the other stat


def test_a_folder_whose_name_looks_like_a_pattern_is_removed_alone(folder: StorePath):
    odd, other = folder / "run[12]*?", folder / "run1-and-2"
    for path in (odd / "a", odd / "deep" / "b", other / "c"):
        write_bytes(path, b"x")
    remove_tree(odd)
    assert [path.name for path in folder.iterdir()] == ["run1-and-2"]


def test_parquet_is_read_by_ranges(folder: StorePath):
    table = pa.table({"a": list(range(1000)), "b": ["x" * 100] * 1000})
    with atomic_path(folder / "t.parquet") as temporary:
        pq.write_table(table, temporary, row_group_size=100)
        digest = sha256_file(temporary)
    assert pq.read_table(arrow_source(folder / "t.parquet")) == table
    assert sha256_file(folder / "t.parquet") == digest


@pytest.mark.slow
def test_shards_scores_and_index_on_a_store_are_those_on_a_disk(folder: StorePath, server: Faults, tmp_path: Path):
    server.every = 7
    for path in (folder, tmp_path):
        write_directory(path)
        with ShardWriter(path / "part.tar") as writer:
            for number in range(3):
                writer.write(f"{number:09d}", make_sample(number))
        write_index_part(path / "part.parquet", writer.trajectories)
        # The first tar has its part of the index; the second tar is read.
        write_index(ShardDirectory(path), [path / "part.parquet", path / "missing.parquet"])
        write_rejects(path / "rejected.parquet", [Reject(pair_id="a", source="b", stage="c", reason="d")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }
    assert [sample.meta for sample in ShardDirectory(folder).samples()] == [make_sample(n).meta for n in range(6)]
    assert list(indexed_trajectories(ShardDirectory(folder))) == list(indexed_trajectories(ShardDirectory(tmp_path)))
    assert [each.pair_id for each in read_rejects(folder / "rejected.parquet")] == ["a"]


def test_a_large_file_goes_up_in_parts(folder: StorePath, tmp_path: Path, server: Faults):
    content = bytes(range(256)) * (110 * 4096)  # 110 MiB: above the client's threshold of 100
    before = server.requests
    write_bytes(folder / "large", content)
    assert server.requests - before >= 4  # begin, parts, complete
    (folder / "large").download(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.slow
def test_transient_failures_change_nothing(folder: StorePath, server: Faults, tmp_path: Path):
    server.every, server.injected = 3, type(server.injected)()
    contents = {f"{number}.bin": bytes([number]) * (1 << 18) for number in range(12)}
    for name, content in contents.items():
        write_bytes(folder / name, content)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    for name, content in contents.items():
        with (folder / name).open() as file:
            assert file.read() == content
    assert {"500", "503", "slow", "cut"} <= {way for way, count in server.injected.items() if count}


@pytest.mark.slow
def test_a_store_that_keeps_failing_is_one_line_and_not_a_missing_file(folder: StorePath, server: Faults):
    write_bytes(folder / "a", b"x")
    server.every = 1
    ways, server.ways = server.ways, itertools.repeat("500")
    try:
        with pytest.raises(UserError, match="cannot read s3://bucket/.*a, tried 4 times"):
            (folder / "a").is_file()
    finally:
        server.every, server.ways = 0, ways


def test_a_missing_bucket_and_an_unknown_protocol_are_one_line(server: Faults):
    nothing = StorePath("s3://nobucket/a")
    for what, use in {
        "write": lambda: write_bytes(nothing, b"x"),
        "write.": lambda: nothing.create(b"x"),
        "read": nothing.exists,
        "list": lambda: list(nothing.iterdir()),
    }.items():
        with pytest.raises(UserError, match=f"cannot {what.strip('.')} s3://nobucket/a: .* bucket does not exist"):
            use()
    with pytest.raises(UserError, match="nosuch://bucket/a: Protocol not known"):
        StorePath("nosuch://bucket/a").exists()
