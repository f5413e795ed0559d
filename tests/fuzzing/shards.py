"""Hostile manifests, tars, indices and samples."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from rich.console import Console

from smpo_pipeline.inspection.recognise import recognise
from smpo_pipeline.inspection.shards import print_shards, summarise_shards
from smpo_schemas.manifest import MANIFEST_FILE, read_manifest
from smpo_schemas.shards.index import INDEX_FILE, indexed_trajectories, write_index
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import decode_sample, encode_sample
from smpo_trainer.data.loader import StateDataset, collate, require_batch
from smpo_trainer.data.state_table import index_states
from smpo_trainer.objectives.dpo import DPO
from smpo_trainer.shards.fetch import ShardSource
from smpo_trainer.shards.shard_set import ShardSet
from tests.fuzzing.mutate import HOSTILE_JSON, damage, damaged_parquet, distort, distort_json, odd_column
from tests.schemas.helpers import statistics
from tests.schemas.shards.test_samples import make_sample, write_directory

Run = Callable[[], str]


def _manifest(draw: random.Random, folder: Path) -> Run:
    _write_shards(folder, indexed=draw.random() < 0.5)
    distort_json(folder / MANIFEST_FILE, draw)
    return lambda: _read_shards(folder)


def _write_shards(folder: Path, *, indexed: bool) -> None:
    write_directory(folder, shards=1)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["rewards"] = {"clipscore": statistics([[0.1, -0.2]]).model_dump()}
    band = {"start": 0, "stop": 1000, "states": 9, "noise_ratio": 1.0, "residual": 0.1, "neighbour_correlation": 0.0}
    manifest["health"] = [band]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    if indexed:
        manifest["index"] = write_index(ShardDirectory(folder)).model_dump()
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def _sign(folder: Path) -> None:
    """Make the manifest say of what is there that it is right: hostile shards come with their own manifest."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    for entry in [*manifest["shards"], *([manifest["index"]] if manifest.get("index") else [])]:
        data = (folder / entry["name"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def _tar(draw: random.Random, folder: Path) -> Run:
    _write_shards(folder, indexed=draw.random() < 0.3)
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    what = draw.choice(("bytes", "header", "header", "member", "member", "packed", "sample", "sample"))
    if what == "bytes":
        path.write_bytes(damage(data, draw, [data]))
    elif what == "header":
        path.write_bytes(_damaged_header(data, draw))
    elif what == "packed":
        path.write_bytes(draw.choice((_gzip_bomb(), b"\x1f\x8b" + data, b"BZh9" + data, b"\xfd7zXZ\0" + data)))
    else:
        path.write_bytes(_hostile_tar(draw, whole=what == "member"))
    if draw.random() < 0.9:
        _sign(folder)
    return lambda: _read_shards(folder)


def _damaged_header(data: bytes, draw: random.Random) -> bytes:
    """A member's header with another field and the checksum made right."""
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = draw.choice(headers)
    header = bytearray(data[at : at + 512])
    start, length = draw.choice(((0, 100), (100, 8), (124, 12), (124, 12), (124, 12), (136, 12), (156, 1), (345, 155)))
    value = draw.choice(
        (
            b"77777777777",
            b"00000000000",
            b"\x80" + bytes(3) + struct.pack(">Q", draw.choice((2**62, 2**63 - 1, 2**40, 0))),
            b"\xff" * 12,
            b"\xff" + b"\xff" * 7 + struct.pack(">I", draw.choice((2**32 - 512, 2**32 - 1024))),
            b"-0000000512",
            draw.choice(b"0123456789gxLKSVDMN").to_bytes(1, "little"),
            b"../../outside",
            b"/etc/passwd",
        )
    )[:length]
    header[start : start + length] = value.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


@cache
def _gzip_bomb() -> bytes:
    import gzip

    return gzip.compress(bytes(1 << 28))


def _hostile_tar(draw: random.Random, *, whole: bool) -> bytes:
    """A well-formed tar with members that no shard has, or with hostile samples."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for number in range(3):
            members = encode_sample(make_sample(number))
            if number == 1 and not whole:
                members = {"json": _hostile_meta(members["json"], draw), "safetensors": members["safetensors"]}
                members["safetensors"] = hostile_tensors(members["safetensors"], draw)
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                if whole and number == 1:
                    member.name = draw.choice((member.name, f"../{member.name}", f"/{member.name}", "a/b.json"))
                    member.type = draw.choice((*b"01234567xgLKS",)).to_bytes(1, "little")
                    member.linkname = draw.choice(("000000000.json", "/etc/passwd", "../../outside", ""))
                    if draw.random() < 0.3:
                        member.pax_headers = {
                            draw.choice(("size", "path", "GNU.sparse.size", "GNU.sparse.map")): "9" * 9
                        }
                member.size = len(content)
                for _ in range(draw.choice((1, 1, 2)) if whole else 1):
                    tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _hostile_meta(data: bytes, draw: random.Random) -> bytes:
    what = draw.random()
    if what < 0.3:
        return data
    if what < 0.8:
        return json.dumps(distort(json.loads(data), draw)).encode()
    return draw.choice(HOSTILE_JSON)()


def hostile_tensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors member with another header: lengths, offsets, types, shapes, nesting."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = draw.choice(("header", "header", "length", "bytes", "json", "shape", "values"))
    if what == "length":
        return struct.pack("<Q", draw.choice((0, 1, length - 1, 2**31, 2**63 - 1, 2**64 - 1))) + data[8:]
    if what == "bytes":
        return damage(data, draw, [data])
    if what == "shape":
        odd = {"x0": torch.zeros(draw.choice(((0,), (2, 0, 8, 8), (2, 4, 8, 8), (3,)))), "timestep": torch.zeros(0)}
        return safetensors.torch.save({**safetensors.torch.load(data), **odd})
    if what == "values":
        tensors = safetensors.torch.load(data)
        name = draw.choice(list(tensors))
        tensors[name] = torch.full_like(tensors[name], draw.choice((0, -1, 2)))
        return safetensors.torch.save(tensors)
    packed = draw.choice(HOSTILE_JSON)() if what == "json" else json.dumps(distort(header, draw)).encode()
    return struct.pack("<Q", len(packed)) + packed + rest


def _index(draw: random.Random, folder: Path) -> Run:
    _write_shards(folder, indexed=True)
    path = folder / INDEX_FILE
    if draw.random() < 0.4:
        path.write_bytes(damaged_parquet(path.read_bytes(), draw))
    else:
        table = pq.read_table(path)
        name = draw.choice(table.column_names)
        odd = draw.choice((0, -1, 1, 10, 2**31 - 1, 2**62))
        if pa.types.is_int64(table.schema.field(name).type) or name == "shard":
            column = pa.array([odd] * len(table), pa.int64())
        elif draw.random() < 0.4:
            column = pa.array([[odd], None, []])
        else:
            column = odd_column(draw, len(table))
        pq.write_table(table.set_column(table.column_names.index(name), name, column), path)
    _sign(folder)
    return lambda: _read_shards(folder)


def _read_shards(folder: Path) -> str:
    """As ``inspect`` and the trainer do; both must be free of anything but one line."""
    directory = ShardDirectory(folder, read_manifest(folder))
    reading = (
        lambda: [directory.read(trajectory.location) for trajectory in list(indexed_trajectories(directory))],
        lambda: list(directory.samples()),
        lambda: _read_states(folder, directory),
    )
    problems = [_refused(read) for read in reading]
    summary = summarise_shards(recognise(folder)[1], limit=None, samples=1, advance=lambda *_: None)
    print_shards(summary, folder, Console(markup=False))
    return "refused" if any(problems) else "read"


def _read_states(folder: Path, directory: ShardDirectory) -> None:
    """List the states of the directory, read each, and make a batch of those of each shape."""
    shards = ShardSet((ShardSource(str(folder), folder, directory, None),))
    table = index_states(shards, _objective(), None, None, (None, None), say=lambda _: None)
    dataset, buckets = StateDataset(shards, table), table.buckets()
    of_buckets = [(buckets == bucket).nonzero()[0] for bucket in range(len(table.latents))]
    for batch in [collate([dataset[int(state)] for state in states]) for states in of_buckets]:
        require_batch(batch)


@cache
def _objective() -> DPO:
    """One that learns from each state with a label."""
    return DPO(DPO.Options(beta=1.0, ties="keep"))


def _refused(read: Callable[[], object]) -> bool:
    from smpo_common.errors import UserError

    try:
        read()
    except UserError:
        return True
    return False


def _member(draw: random.Random, folder: Path) -> Run:
    members = encode_sample(make_sample(0))
    meta, tensors = _hostile_meta(members["json"], draw), hostile_tensors(members["safetensors"], draw)

    def run() -> str:
        decode_sample(meta, tensors, "here")
        return "read"

    return run


KINDS = (_manifest, _tar, _tar, _index, _member)
