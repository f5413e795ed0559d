"""``index.parquet``: where each walk lies in the shards and what it is, so that a trainer need not read them all first.

Everything in it can be made again from the tars; a directory without it is indexed by reading them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from smpo_schemas.errors import UserError, describe_problem
from smpo_schemas.files import atomic_path, sha256_file
from smpo_schemas.manifest import IndexEntry
from smpo_schemas.shards import SampleLocation, SampleMeta, ShardDirectory

INDEX_FILE = "index.parquet"

_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("meta_offset", pa.int64()),
        ("meta_bytes", pa.int64()),
        ("tensors_offset", pa.int64()),
        ("tensors_bytes", pa.int64()),
        ("meta", pa.string()),
        ("timesteps", pa.list_(pa.int32())),
        ("latent", pa.list_(pa.int32())),
    ]
)
_ROWS = 4096


@dataclass(frozen=True)
class IndexedWalk:
    """One walk, without its latents.

    Attributes:
        location: where it lies.
        meta: which walk of which pair it is.
        timesteps: of its K states, increasing.
        latent: the shape (C, h, w) of its latents.
    """

    location: SampleLocation
    meta: SampleMeta
    timesteps: tuple[int, ...]
    latent: tuple[int, ...]


def indexed_walks(directory: ShardDirectory) -> Iterator[IndexedWalk]:
    """All walks of a directory in order, from its index, or from its tars where it has none.

    Raises:
        UserError: the index differs from the manifest, or a tar is malformed.
    """
    return _read(directory, directory.manifest.index) if directory.manifest.index else _scan(directory)


def write_index(directory: ShardDirectory) -> IndexEntry:
    """Index the tars of a directory; equal tars give equal bytes.

    Raises:
        UserError: a tar is malformed, or the index cannot be written.
    """
    path = directory.path / INDEX_FILE
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
        rows: list[dict[str, object]] = []
        for walk in _scan(directory):
            rows.append(_row(walk))
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
    return IndexEntry(name=INDEX_FILE, bytes=path.stat().st_size, sha256=sha256_file(path))


def _row(walk: IndexedWalk) -> dict[str, object]:
    place = walk.location
    return {
        "shard": place.shard,
        "key": place.key,
        "meta_offset": place.meta[0],
        "meta_bytes": place.meta[1],
        "tensors_offset": place.tensors[0],
        "tensors_bytes": place.tensors[1],
        "meta": walk.meta.model_dump_json(),
        "timesteps": list(walk.timesteps),
        "latent": list(walk.latent),
    }


def _read(directory: ShardDirectory, entry: IndexEntry) -> Iterator[IndexedWalk]:
    path = directory.path / entry.name
    if not path.is_file():
        raise UserError(f"{path} is missing; the manifest lists it")
    if sha256_file(path) != entry.sha256:
        raise UserError(f"{path} differs from the SHA-256 in the manifest: damaged or replaced")
    try:
        for batch in pq.ParquetFile(path).iter_batches(_ROWS):
            for row in batch.to_pylist():
                location = SampleLocation(
                    row["shard"],
                    row["key"],
                    (row["meta_offset"], row["meta_bytes"]),
                    (row["tensors_offset"], row["tensors_bytes"]),
                )
                meta = SampleMeta.model_validate_json(row["meta"])
                yield IndexedWalk(location, meta, tuple(row["timesteps"]), tuple(row["latent"]))
    except ValidationError as error:
        raise UserError(f"{path} is malformed: {describe_problem(error)}") from error
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{path} is malformed: {error}") from error


def _scan(directory: ShardDirectory) -> Iterator[IndexedWalk]:
    """Read the tars' headers, their JSON members, and of the tensors the timesteps alone."""
    for shard, entry in enumerate(directory.manifest.shards):
        path = directory.path / entry.name
        locations = directory.locate(shard)
        with path.open("rb") as file:
            for location in locations:
                file.seek(location.meta[0])
                meta = file.read(location.meta[1])
                file.seek(location.tensors[0])
                try:
                    (length,) = struct.unpack("<Q", file.read(8))
                    header = json.loads(file.read(min(length, location.tensors[1])))
                    begin, end = header["timestep"]["data_offsets"]
                    file.seek(begin, 1)
                    timesteps = struct.unpack(f"<{(end - begin) // 8}q", file.read(end - begin))
                    latent = tuple(header["x0"]["shape"][1:])
                    yield IndexedWalk(location, SampleMeta.model_validate_json(meta), timesteps, latent)
                except ValidationError as error:
                    problem = describe_problem(error)
                    raise UserError(f"{path}: sample {location.key}: malformed json member: {problem}") from error
                except (struct.error, ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path}: sample {location.key}: malformed safetensors member: {error}") from error
