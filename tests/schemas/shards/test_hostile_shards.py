"""Hostile shards, manifests and indices: findings of ``python -m tests.fuzz``."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from smpo_common.errors import UserError
from smpo_common.files import write_json
from smpo_schemas.manifest import MANIFEST_FILE, read_manifest
from smpo_schemas.shards.index import INDEX_FILE, indexed_trajectories, write_index
from smpo_schemas.shards.reader import SampleLocation, ShardDirectory
from smpo_schemas.shards.samples import decode_sample, encode_sample
from tests.schemas.shards.test_samples import make_sample, write_directory

MEMBERS = encode_sample(make_sample(0))


def signed(path, **files: bytes) -> ShardDirectory:
    """Replace files of a directory and update the hashes in its manifest."""
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    for entry in [*manifest["shards"], *([manifest["index"]] if manifest["index"] else [])]:
        if entry["name"] in files:
            (path / entry["name"]).write_bytes(files[entry["name"]])
        data = (path / entry["name"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(path / MANIFEST_FILE, manifest)
    return ShardDirectory(path)


def refused(path, tar: bytes, match: str) -> None:
    """Assert that reading samples and indexing both raise an error that matches, for a directory with this tar."""
    write_directory(path, shards=1, samples=1)
    directory = signed(path, **{"shard-000000.tar": tar})
    for reading in (directory.samples, lambda: indexed_trajectories(directory)):
        with pytest.raises(UserError, match=match):
            list(reading())


def tar_of(*members: tarfile.TarInfo, contents=(MEMBERS["json"], MEMBERS["safetensors"])) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for member, content in zip(members, contents, strict=False):
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "name",
    ["../000000000.json", "/000000000.json", "a/000000000.json", "key.json", "\u0661.json", ".json", "x" * 150],
)
def test_foreign_member_names_are_refused(tmp_path, name):
    refused(tmp_path, tar_of(member(name), member("000000000.safetensors")), "member .*(shard|regular file)")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_members_that_are_not_regular_files_are_refused(tmp_path, kind):
    tar = tar_of(member("000000000.json", kind, "/etc/passwd"), member("000000000.safetensors"))
    refused(tmp_path, tar, "member .*regular file")


def test_a_repeated_member_is_refused(tmp_path):
    names = ("000000000.json", "000000000.safetensors", "000000000.json")
    tar = tar_of(*map(member, names), contents=(MEMBERS["json"], MEMBERS["safetensors"], MEMBERS["json"]))
    refused(tmp_path, tar, "member .000000000.json. .*repeated")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 12,  # minus one, in base 256
        b"\xff" * 10 + b"\xfe\x00",
        b"\x80" + bytes(3) + struct.pack(">Q", 2**63 - 1),
        b"\x80" + bytes(3) + struct.pack(">Q", 2**39),
        b"77777777777\0",
        b"-0000000512\0",
    ],
)
def test_impossible_member_sizes_are_refused(tmp_path, size):
    tar = bytearray(tar_of(member("000000000.json"), member("000000000.safetensors")))
    tar[124:136] = size
    tar[148:156] = b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    refused(tmp_path, bytes(tar), "cannot be read")


@pytest.mark.timeout(30)
def test_a_compressed_tar_is_not_unpacked(tmp_path):
    refused(tmp_path, gzip.compress(bytes(1 << 26)), "cannot be read")


HEADER_LENGTH = struct.unpack("<Q", MEMBERS["safetensors"][:8])[0]
HEADER = json.loads(MEMBERS["safetensors"][8 : 8 + HEADER_LENGTH])
REST = MEMBERS["safetensors"][8 + HEADER_LENGTH :]


def with_header(**changes) -> bytes:
    packed = json.dumps({name: {**part, **changes.get(name, {})} for name, part in HEADER.items()}).encode()
    return struct.pack("<Q", len(packed)) + packed + REST


@pytest.mark.parametrize(
    "tensors",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63 - 1) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        with_header(x0={"dtype": "F32"}),
        with_header(x0={"dtype": "F8_E8M0"}),
        with_header(x0={"dtype": "nothing"}),
        with_header(x0={"shape": [2**62, 4]}),
        with_header(x0={"data_offsets": [0, 2**63]}),
        with_header(noise={"data_offsets": HEADER["x0"]["data_offsets"], "shape": HEADER["x0"]["shape"]}),
        with_header(timestep={"data_offsets": [-8, 2**40]}),
        with_header(timestep={"data_offsets": ["a", None]}),
        with_header(timestep={"data_offsets": [0, 2**40]}),
        safetensors.torch.save({**safetensors.torch.load(MEMBERS["safetensors"]), "x0": torch.zeros(2, 0, 8, 8)}),
    ],
)
def test_tensors_beyond_the_file_are_refused(tmp_path, tensors):
    with pytest.raises(UserError, match="here"):
        decode_sample(MEMBERS["json"], tensors, "here")
    write_directory(tmp_path, shards=1, samples=1)
    tar = tar_of(member("000000000.json"), member("000000000.safetensors"), contents=(MEMBERS["json"], tensors))
    directory = signed(tmp_path, **{"shard-000000.tar": tar})
    try:
        trajectories = list(indexed_trajectories(directory))  # reads only the timesteps
    except UserError as error:
        assert "malformed safetensors" in str(error)  # noqa: PT017  (an index of it is allowed)
    else:
        assert trajectories[0].timesteps == (100, 200, 300)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 3),
        ("size", [[1, 2]]),
        ("scores", {"clipscore": [float("nan"), 0]}),
        ("scores", {"clipscore": [float("inf"), 0]}),
        ("extra", 1),
    ],
)
def test_meta_of_other_kinds(field, value):
    meta = json.dumps(json.loads(MEMBERS["json"]) | {field: value}).encode()
    with pytest.raises(UserError, match="malformed json member"):
        decode_sample(meta, MEMBERS["safetensors"], "here")
    with pytest.raises(UserError, match="malformed json member"):
        decode_sample(b"[" * 100_000, MEMBERS["safetensors"], "here")


OUTSIDE = ["../outside.tar", "/etc/passwd", "a/b.tar", "..", ".hidden", "", "a\0b", "x" * 300]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("which", ["shards", "index"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, name, which):
    """The trainer downloads shards to the names in the manifest."""
    write_directory(tmp_path, shards=1)
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    manifest["index"] = write_index(ShardDirectory(tmp_path)).model_dump()
    (manifest["shards"][0] if which == "shards" else manifest["index"])["name"] = name
    write_json(tmp_path / MANIFEST_FILE, manifest)
    with pytest.raises(UserError, match=rf"malformed: {which}.*name"):
        ShardDirectory(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"schema_version": 1, "seed": ' + b"9" * 5000 + b"}",
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "a\\u001b[2J": 0}',
        b"\xff\xfe",
        b"null",
        b"",
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(UserError, match="manifest") as caught:
        read_manifest(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("resolution",), 0),
        (("model", "num_train_timesteps"), -5),
        (("totals", "samples"), 10**30),
        (("shards", 0, "bytes"), -1),
        (("inversion", "eta"), float("inf")),
    ],
)
def test_impossible_numbers_are_refused(tmp_path, place, value):
    write_directory(tmp_path, shards=1)
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    holder = manifest
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=str(place[-1])):
        read_manifest(tmp_path)


@pytest.fixture
def indexed(tmp_path):
    """Write a directory whose index has a column replaced."""
    write_directory(tmp_path, shards=1)
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    manifest["index"] = write_index(ShardDirectory(tmp_path)).model_dump()
    write_json(tmp_path / MANIFEST_FILE, manifest)
    table = pq.read_table(tmp_path / INDEX_FILE)

    def change(name: str, values: pa.Array | None) -> ShardDirectory:
        position = table.column_names.index(name)
        changed = table.remove_column(position) if values is None else table.set_column(position, name, values)
        pq.write_table(changed, tmp_path / INDEX_FILE)
        return signed(tmp_path)

    return change


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("shard", pa.array([0, 0, 1])),
        ("shard", pa.array([0, 0, -1])),
        ("shard", pa.array([0, 0, None], pa.int32())),
        ("meta_offset", pa.array([-1] * 3)),
        ("key", pa.array(["ü"] * 3)),
        ("key", None),
        ("key", pa.array([b"\xff"] * 3, pa.binary()).view(pa.string())),
        ("meta", pa.array(["{}"] * 3)),
        ("meta", pa.array([None] * 3, pa.string())),
        ("timesteps", pa.array([None, [1], [2]])),
        ("timesteps", pa.array([[None], [1], [2]])),
        ("key", pa.array(["1" * 101] * 3)),
        ("latent", pa.array([[-1]] * 3)),
        ("latent", pa.array([[4, 8]] * 3)),
        ("latent", pa.array([[4, 0, 8]] * 3)),
        ("latent", pa.array([[2**31 - 1, 1, 1]] * 3)),
        ("latent", pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64()))),
    ],
)
def test_an_index_with_wrong_values(indexed, name, values):
    with pytest.raises(UserError, match=INDEX_FILE):
        list(indexed_trajectories(indexed(name, values)))


def test_an_index_that_points_outside_its_tar_takes_no_memory(indexed):
    directory = indexed("tensors_bytes", pa.array([2**62] * 3))
    with pytest.raises(UserError, match="no 4611686018427387904 bytes"):
        directory.read(next(indexed_trajectories(directory)).location)
    with pytest.raises(UserError, match="no 8 bytes at -1"):
        directory.read(SampleLocation(0, "0", (-1, 8), (0, 8)))
