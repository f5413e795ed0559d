"""``index.parquet``: each trajectory's place in the tars and its metadata, so that a trainer need not read all tars.

The tars contain everything in it; a directory without an index is indexed by reading them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import arrow_source, atomic_path, read_all, reading_parquet, sha256_file
from smpo_common.store_path import AnyPath
from smpo_schemas.frozen import StoredFile
from smpo_schemas.manifest import ShardEntry
from smpo_schemas.shards.reader import IndexedTrajectory, SampleLocation, ShardDirectory
from smpo_schemas.shards.samples import SampleMeta
from smpo_schemas.shards.stored_state import read_trajectory

INDEX_FILE = "index.parquet"

INDEX_SCHEMA = pa.schema(
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
_TIMESTEPS = INDEX_SCHEMA.get_field_index("timesteps")
FLOW_INDEX_SCHEMA = INDEX_SCHEMA.set(_TIMESTEPS, pa.field("timesteps", pa.list_(pa.float32())))
"""The same for flow-matching models, whose timesteps are fractions."""

_ROWS = 4096
_PARTS_AT_ONCE = 64

_MAX_KEY_LENGTH = 100
"""Limit of tar names; readers keep keys in fixed-width arrays, which a longer key would make huge."""


def indexed_trajectories(directory: ShardDirectory) -> Iterator[IndexedTrajectory]:
    """Yield all trajectories of a directory in order, from its index or, without one, from its tars.

    Raises:
        UserError: the index differs from the manifest, or a tar is malformed.
    """
    return _read(directory, directory.manifest.index) if directory.manifest.index else _scan_all(directory)


def write_index(directory: ShardDirectory, parts: Sequence[AnyPath] = ()) -> StoredFile:
    """Index the tars of a directory; equal tars give equal bytes.

    Args:
        directory: the tars, and the manifest that lists them.
        parts: for each tar the file of :func:`write_index_part`; a tar whose file is missing is read.

    Raises:
        UserError: a tar is malformed, or the index cannot be written.
    """
    with atomic_path(directory.path / INDEX_FILE) as temporary:
        _write(temporary, _from_parts(directory, parts) if parts else _scan_all(directory))
        return StoredFile(name=INDEX_FILE, bytes=temporary.stat().st_size, sha256=sha256_file(temporary))


def write_index_part(path: AnyPath, trajectories: Iterable[IndexedTrajectory]) -> None:
    """Write one tar's rows of the index, so that :func:`write_index` need not read the tar."""
    with atomic_path(path) as temporary:
        _write(temporary, trajectories)


def _write(path: Path, trajectories: Iterable[IndexedTrajectory]) -> None:
    remaining = iter(trajectories)
    first = next(remaining, None)
    is_flow = first is not None and any(isinstance(t, float) for t in first.timesteps)
    schema = FLOW_INDEX_SCHEMA if is_flow else INDEX_SCHEMA
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[dict[str, object]] = []
        for trajectory in chain([first] if first else [], remaining):
            rows.append(_row(trajectory))
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))


def _from_parts(directory: ShardDirectory, parts: Sequence[AnyPath]) -> Iterator[IndexedTrajectory]:
    def trajectories(shard: int) -> list[IndexedTrajectory]:
        if not parts[shard].is_file():
            return list(_scan(directory, shard))
        with reading_parquet(parts[shard]):
            table = pq.read_table(arrow_source(parts[shard]))
            # A part's rows say shard 0: its writer does not know the tar's number.
            entries = directory.manifest.shards[shard : shard + 1]
            return [
                replace(trajectory, location=replace(trajectory.location, shard=shard))
                for trajectory in _trajectories(table, entries)
            ]

    for start in range(0, len(parts), _PARTS_AT_ONCE):
        yield from chain.from_iterable(read_all(trajectories, range(start, min(start + _PARTS_AT_ONCE, len(parts)))))


def _row(trajectory: IndexedTrajectory) -> dict[str, object]:
    location = trajectory.location
    return {
        "shard": location.shard,
        "key": location.key,
        "meta_offset": location.meta[0],
        "meta_bytes": location.meta[1],
        "tensors_offset": location.tensors[0],
        "tensors_bytes": location.tensors[1],
        "meta": trajectory.meta.model_dump_json(),
        "timesteps": list(trajectory.timesteps),
        "latent": list(trajectory.latent),
    }


def _read(directory: ShardDirectory, entry: StoredFile) -> Iterator[IndexedTrajectory]:
    path = directory.path / entry.name
    if not path.is_file():
        raise UserError(f"{path} is missing; the manifest lists it")
    if sha256_file(path) != entry.sha256:
        raise UserError(f"{path} differs from the SHA-256 in the manifest: damaged or replaced")
    with reading_parquet(path):
        for batch in pq.ParquetFile(arrow_source(path)).iter_batches(_ROWS):
            yield from _trajectories(batch, directory.manifest.shards)


def _trajectories(batch: pa.RecordBatch | pa.Table, shards: Sequence[ShardEntry]) -> Iterator[IndexedTrajectory]:
    table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
    kind = table.schema.field("timesteps").type
    is_flow = pa.types.is_list(kind) and pa.types.is_floating(kind.value_type)
    schema = FLOW_INDEX_SCHEMA if is_flow else INDEX_SCHEMA
    table = table.select(schema.names).cast(schema)
    table.validate(full=True)
    for row in table.to_pylist():
        yield _trajectory(row, shards)


def _trajectory(row: dict[str, Any], shards: Sequence[ShardEntry]) -> IndexedTrajectory:
    """Parse a row of the index and check its values now, rather than fail in the middle of a training run.

    Raises:
        ValueError: a value is missing or impossible.
    """
    numbers = [row[name] for name in ("shard", "meta_offset", "meta_bytes", "tensors_offset", "tensors_bytes")]
    if any(number is None or number < 0 for number in numbers) or numbers[0] >= len(shards):
        raise ValueError(f"a trajectory lies at {numbers}; there are {len(shards)} shards")
    key = row["key"]
    if not (key and key.isascii() and key.isdecimal() and len(key) <= _MAX_KEY_LENGTH) or row["meta"] is None:
        raise ValueError(f"a trajectory has the key {key!r}, or no meta")
    shard, meta_offset, meta_bytes, tensors_offset, tensors_bytes = numbers
    location = SampleLocation(shard, key, (meta_offset, meta_bytes), (tensors_offset, tensors_bytes))
    timesteps, latent = _numbers(row["timesteps"], (int, float)), _numbers(row["latent"], (int,))
    # Bounds the memory: the trainer allocates placeholder latents of this shape for a damaged sample.
    if len(latent) != 3 or not 0 < 4 * math.prod(latent) <= shards[shard].bytes:  # noqa: PLR2004  (C, h, w of 2 images)
        raise ValueError(f"a trajectory has latents of {latent}, its shard {shards[shard].bytes} bytes")
    return IndexedTrajectory(location, SampleMeta.model_validate_json(row["meta"]), timesteps, latent)


def _numbers(values: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:  # noqa: ANN401
    """Check that the value is a list of finite numbers from 0, of the given types.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(values, list) or not all(type(value) in kinds and 0 <= value < math.inf for value in values):
        raise ValueError(f"{values!r} is not a list of numbers from 0")
    return tuple(values)


def _scan_all(directory: ShardDirectory) -> Iterator[IndexedTrajectory]:
    return chain.from_iterable(_scan(directory, shard) for shard in range(len(directory.manifest.shards)))


def _scan(directory: ShardDirectory, shard: int) -> Iterator[IndexedTrajectory]:
    """Read a tar's headers, its JSON members and the timesteps, without latents."""
    path = directory.path / directory.manifest.shards[shard].name
    locations = directory.locate(shard)
    with path.open("rb") as file:
        for location in locations:
            yield read_trajectory(file, location, path)
