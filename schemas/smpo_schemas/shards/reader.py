"""Read shards: find the samples in a directory's tars, check a tar against the manifest, read samples."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from smpo_common.errors import UserError
from smpo_common.files import sha256_file
from smpo_common.store_path import AnyPath, parse_path
from smpo_schemas.manifest import Manifest, ShardEntry, read_manifest
from smpo_schemas.shards.samples import (
    META,
    TENSORS,
    Sample,
    SampleMeta,
    decode_sample,
    timestep_problem,
)
from smpo_schemas.shards.tensor_file import read_at

COPY_AGAIN = "copy the shard again from where it was written"
"""What to do about a damaged shard, for errors."""

_MAX_MEMBER_BYTES = 1 << 40
"""A size that no member has; seek() fails in various ways on absurd ones."""


@dataclass(frozen=True)
class SampleLocation:
    """The tar that holds a sample, its key, and the (offset, length) in bytes of its two members."""

    shard: int
    key: str
    meta: tuple[int, int]
    tensors: tuple[int, int]


class _RegularFile(tarfile.TarInfo):
    """Accepts only regular files.

    Links, devices, folders, sparse files and extended headers are refused before tarfile acts on them.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a member's header.

        Raises:
            tarfile.ReadError: it is not a regular file, or impossibly large.
        """
        member = super().frombuf(buf, encoding, errors)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= member.size <= _MAX_MEMBER_BYTES:
            raise tarfile.ReadError(
                f"member {member.name[:100]!r} is not a regular file of at most {_MAX_MEMBER_BYTES} bytes"
            )
        return member


@dataclass(frozen=True)
class IndexedTrajectory:
    """One trajectory, without its latents.

    Attributes:
        location: its place in the tars.
        meta: its metadata.
        timesteps: timesteps of its K states, increasing.
        latent: shape (C, h, w) of its latents.
    """

    location: SampleLocation
    meta: SampleMeta
    timesteps: tuple[float, ...]
    latent: tuple[int, ...]


def locate_samples(path: AnyPath, entry: ShardEntry, shard: int) -> list[SampleLocation]:
    """List the samples of one tar, in order; see :meth:`ShardDirectory.locate`."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_RegularFile) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if not (key.isascii() and key.isdecimal()) or extension in members.setdefault(key, {}):
                    raise UserError(f"{path}: member {member.name[:100]!r} does not belong in a shard, or is repeated")
                members[key][extension] = (member.offset_data, member.size)
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for key, parts in members.items():
        if set(parts) != {META, TENSORS}:
            raise UserError(f"{path}: sample {key} has the members {sorted(parts)}, expected {[META, TENSORS]}")
    if len(members) != entry.samples:
        raise UserError(f"{path} holds {len(members)} samples, the manifest says {entry.samples}")
    return [SampleLocation(shard, key, parts[META], parts[TENSORS]) for key, parts in members.items()]


class ShardDirectory:
    """A finished output of ``invert``: gives its manifest, and its samples by location or in order."""

    def __init__(self, directory: AnyPath | str, manifest: Manifest | None = None) -> None:
        """Open a directory.

        Args:
            directory: path or URL of the folder of tars.
            manifest: for a writer, the manifest that it is about to write; None: read the directory's.

        Raises:
            UserError: there is no valid manifest.
        """
        self.path = parse_path(directory) if isinstance(directory, str) else directory
        self.manifest = manifest or read_manifest(self.path)

    def verify(self, shard: int) -> None:
        """Check one tar's size and SHA-256 against the manifest.

        Raises:
            UserError: it is missing, truncated or damaged.
        """
        entry = self.manifest.shards[shard]
        path = self.path / entry.name
        if not path.is_file():
            raise UserError(f"{path} is missing; the manifest lists it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise UserError(
                f"{path} has {size} bytes, the manifest says {entry.bytes}: truncated or replaced; {COPY_AGAIN}"
            )
        if sha256_file(path) != entry.sha256:
            raise UserError(f"{path} differs from the SHA-256 in the manifest: damaged or replaced; {COPY_AGAIN}")

    def locate(self, shard: int) -> list[SampleLocation]:
        """List the samples of one tar, in order; every sample must have both members.

        Raises:
            UserError: the tar is malformed, or holds another number of samples than the manifest says.
        """
        entry = self.manifest.shards[shard]
        return locate_samples(self.path / entry.name, entry, shard)

    def read(self, location: SampleLocation) -> Sample:
        """Read one sample by its location.

        Raises:
            UserError: a member is malformed, or the tar cannot be read.
        """
        path = self.path / self.manifest.shards[location.shard].name
        try:
            with path.open("rb") as file:
                meta, tensors = (read_at(file, *part) for part in (location.meta, location.tensors))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        source = f"{path}: sample {location.key}"
        sample = decode_sample(meta, tensors, source)
        problem = timestep_problem(sample.timestep_K.tolist(), self.manifest.model)
        if problem:
            raise UserError(f"{source} (pair {sample.meta.pair_id}): {problem}")
        return sample

    def samples(self, shards: Sequence[int] | None = None) -> Iterator[Sample]:
        """Yield all samples of the given tars (default: all), in order; each tar is verified before it is read."""
        for shard in range(len(self.manifest.shards)) if shards is None else shards:
            self.verify(shard)
            for location in self.locate(shard):
                yield self.read(location)
