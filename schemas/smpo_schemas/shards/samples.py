"""WebDataset shards: one sample is one trajectory of one pair, as ``KEY.json`` and ``KEY.safetensors``.

Shape suffixes: K states, 2 images, C h w a latent.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import BinaryIO, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from webdataset import TarWriter

from smpo_common.errors import UserError, describe_problem
from smpo_common.files import atomic_path, sha256_file
from smpo_common.store_path import AnyPath
from smpo_schemas.manifest import Manifest, ShardEntry, read_manifest

_META, _TENSORS = "json", "safetensors"

STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""What latents and noise can be stored as, by the manifest's name for it."""

_MOST_BYTES = 1 << 40
"""Of a member: offsets beyond any file make seeking fail in ways of its own."""


class SampleMeta(BaseModel):
    """``KEY.json``: which pair, which trajectory of it, and what was drawn for it.

    Attributes:
        pair_id, prompt, label, annotator: as in the pairs.
        trajectory: 0, 1, ...
        flipped: both images were mirrored.
        prompt_dropped: inverted, and to be trained, under the empty prompt.
        scores: per reward the raw scores of image_0 and image_1.
        size: original height and width of both images, in pixels; under ``--size-conditioning constant`` those of the
            crop. It is what a denoiser that takes sizes was and is to be told.
        crop: top and left of both images' crops, in pixels of the resized image; likewise 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    pair_id: str
    trajectory: int
    flipped: bool
    prompt: str
    prompt_dropped: bool
    label: float | None
    annotator: str | None
    scores: dict[str, tuple[float, float]]
    size: tuple[tuple[int, int], tuple[int, int]]
    crop: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Sample:
    """One trajectory.

    Attributes:
        x0_2Chw: float16 or bfloat16, scaled VAE latents of both images: the very sample that the trajectory began from.
        noise_K2Chw: of the same type, tau_t = (x_t - a_t x0) / s_t.
        timestep_K: int64, increasing.
        ref_error_K2: float32, the reference's error at exactly this stored state.
        residual_K2: float32, relative distance from the inversion's fixed point; NaN where no step was taken.
    """

    meta: SampleMeta
    x0_2Chw: torch.Tensor
    noise_K2Chw: torch.Tensor
    timestep_K: torch.Tensor
    ref_error_K2: torch.Tensor
    residual_K2: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by their stored names."""
        return {
            "x0": self.x0_2Chw,
            "noise": self.noise_K2Chw,
            "timestep": self.timestep_K,
            "ref_error": self.ref_error_K2,
            "residual": self.residual_K2,
        }


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """The two members of a sample, by extension; equal samples give equal bytes."""
    meta = json.dumps(sample.meta.model_dump(), ensure_ascii=False, sort_keys=True, allow_nan=False)
    tensors = {name: tensor.contiguous() for name, tensor in sample.tensors().items()}
    return {_META: meta.encode(), _TENSORS: safetensors.torch.save(tensors)}


def decode_sample(meta: bytes, tensors: bytes, source: str) -> Sample:
    """Rebuild a sample from its two members; checks names, types, shapes and that all latents are finite.

    Raises:
        UserError: a member is malformed; the message names ``source``.
    """
    try:
        parsed = SampleMeta.model_validate_json(meta)
        loaded = safetensors.torch.load(tensors)
        sample = Sample(
            meta=parsed,
            x0_2Chw=loaded["x0"],
            noise_K2Chw=loaded["noise"],
            timestep_K=loaded["timestep"],
            ref_error_K2=loaded["ref_error"],
            residual_K2=loaded["residual"],
        )
    except ValidationError as error:
        raise UserError(f"{source}: malformed {_META} member: {describe_problem(error)}") from error
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{source}: malformed {_TENSORS} member: {error}") from error
    problem = _tensor_problem(sample)
    if problem:
        raise UserError(f"{source} (pair {parsed.pair_id}): {problem}")
    return sample


def _tensor_problem(sample: Sample) -> str | None:
    tensors = sample.tensors()
    problem = layout_problem({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    if problem:
        return problem
    for name, tensor in tensors.items():
        if name != "residual" and not torch.isfinite(tensor).all():
            return f"{name} is not finite"
    if not (sample.timestep_K.diff() > 0).all():
        return "timesteps do not increase"
    return None


def layout_problem(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> str | None:
    """What is wrong with the types and shapes of a sample's tensors (by their stored names), or None."""
    x0_dtype, latent = tensors["x0"]
    count = math.prod(tensors["timestep"][1])
    stored = x0_dtype if x0_dtype in STORAGE.values() else torch.float16
    expected = {
        "x0": (stored, latent),
        "noise": (stored, (count, *latent)),
        "timestep": (torch.int64, (count,)),
        "ref_error": (torch.float32, (count, 2)),
        "residual": (torch.float32, (count, 2)),
    }
    if len(latent) != 4 or latent[0] != 2 or 0 in latent or count == 0:  # noqa: PLR2004  (2 images of C x h x w)
        return f"x0 has shape {latent} and there are {count} states; expected [2, C, h, w] and at least one"
    for name, (dtype, shape) in tensors.items():
        if (dtype, shape) != expected[name]:
            return f"{name} is {dtype} {shape}, expected {expected[name][0]} {expected[name][1]}"
    return None


def timestep_problem(timesteps: Sequence[int], num_train_timesteps: int) -> str | None:
    """What is wrong with the timesteps of a trajectory, of which there is one at least, or None.

    Other ones than 0 to T - 1, T = ``num_train_timesteps``, would be looked up as some noise level or other.
    """
    if any(later <= earlier for earlier, later in pairwise(timesteps)):
        return "timesteps do not increase"
    if not 0 <= timesteps[0] <= timesteps[-1] < num_train_timesteps:
        return f"timesteps {timesteps[0]} to {timesteps[-1]} are not within 0 to {num_train_timesteps - 1}"
    return None


class ShardWriter:
    """Writes one tar that appears under its name only when whole; equal samples give equal bytes.

    Use as a context manager; what follows is there after a successful exit. An exception leaves no file.

    Attributes:
        entry: what the manifest is to say of it.
        trajectories: what it holds, in order: where each sample lies (``shard`` 0), and the sample without its latents.
    """

    entry: ShardEntry
    trajectories: list[IndexedTrajectory]

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        self._atomic = atomic_path(path)
        self._pairs = 0
        self._written: list[tuple[SampleMeta, tuple[int, ...], tuple[int, ...]]] = []

    def __enter__(self) -> Self:
        self._temporary = self._atomic.__enter__()
        # A fixed time and no owner: the bytes then depend on the samples alone.
        self._stream = self._temporary.open("wb")
        self._tar = TarWriter(self._stream, mtime=0, user="", group="", mode=0o444)
        return self

    def write(self, key: str, sample: Sample) -> None:
        """Append a sample under ``key`` (digits, no dots)."""
        self._tar.write({"__key__": key, **encode_sample(sample)})
        self._pairs += sample.meta.trajectory == 0
        self._written.append((sample.meta, tuple(sample.timestep_K.tolist()), tuple(sample.x0_2Chw.shape[1:])))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tar.close()
            self._stream.close()
            if error is None:
                self._describe()
        except (OSError, UserError) as closing:
            # A full disk may show only here; the file must then not be renamed into place.
            kind, error, trace = (kind, error, trace) if error else (type(closing), closing, closing.__traceback__)
        self._atomic.__exit__(kind, error, trace)

    def _describe(self) -> None:
        """Read back what was written, while it is on this machine."""
        self.entry = ShardEntry(
            name=self._path.name,
            pairs=self._pairs,
            samples=len(self._written),
            states=sum(len(timesteps) for _, timesteps, _ in self._written),
            bytes=self._temporary.stat().st_size,
            sha256=sha256_file(self._temporary),
        )
        locations = _locate(self._temporary, self.entry, 0)
        self.trajectories = [
            IndexedTrajectory(location, *written) for location, written in zip(locations, self._written, strict=True)
        ]


@dataclass(frozen=True)
class SampleLocation:
    """Where a sample's two members lie in the tars of a directory: byte offsets and lengths."""

    shard: int
    key: str
    meta: tuple[int, int]
    tensors: tuple[int, int]


class _PlainMember(tarfile.TarInfo):
    """A member that is a plain file, as all of a shard are.

    Links, devices, folders, sparse files and extended headers are refused before tarfile acts on them.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a member's header.

        Raises:
            tarfile.ReadError: it is of another kind, or of a size that no member has.
        """
        member = super().frombuf(buf, encoding, errors)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= member.size <= _MOST_BYTES:
            raise tarfile.ReadError(f"member {member.name[:100]!r} is no plain file of at most {_MOST_BYTES} bytes")
        return member


@dataclass(frozen=True)
class IndexedTrajectory:
    """One trajectory, without its latents.

    Attributes:
        location: where it lies.
        meta: which trajectory of which pair it is.
        timesteps: of its K states, increasing.
        latent: the shape (C, h, w) of its latents.
    """

    location: SampleLocation
    meta: SampleMeta
    timesteps: tuple[int, ...]
    latent: tuple[int, ...]


def _locate(path: AnyPath, entry: ShardEntry, shard: int) -> list[SampleLocation]:
    """The samples of one tar, in order; see :meth:`ShardDirectory.locate`."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_PlainMember) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if not (key.isascii() and key.isdecimal()) or extension in members.setdefault(key, {}):
                    raise UserError(f"{path}: member {member.name[:100]!r} is no member of a shard, or there twice")
                members[key][extension] = (member.offset_data, member.size)
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for key, parts in members.items():
        if set(parts) != {_META, _TENSORS}:
            raise UserError(f"{path}: sample {key} has the members {sorted(parts)}, expected {[_META, _TENSORS]}")
    if len(members) != entry.samples:
        raise UserError(f"{path} holds {len(members)} samples, the manifest says {entry.samples}")
    return [SampleLocation(shard, key, parts[_META], parts[_TENSORS]) for key, parts in members.items()]


def read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """The bytes of a member, or of a part of it.

    Raises:
        OSError: they lie outside the file; they are not asked for, since memory would be taken.
    """
    size = file.seek(0, os.SEEK_END)
    if not (0 <= offset <= size and 0 <= length <= size - offset):
        raise OSError(f"it has no {length} bytes at {offset}")
    file.seek(offset)
    return file.read(length)


class ShardDirectory:
    """A finished output of ``invert``: its manifest, and its samples by location or in order."""

    def __init__(self, directory: AnyPath, manifest: Manifest | None = None) -> None:
        """Open a directory.

        Args:
            directory: where the tars lie.
            manifest: what is about to be written there; None: read it from there.

        Raises:
            UserError: there is no valid manifest.
        """
        self.path = directory
        self.manifest = manifest or read_manifest(directory)

    def verify(self, shard: int) -> None:
        """Check one tar's size and SHA-256 against the manifest.

        Raises:
            UserError: it is missing, cut, or differs by a bit.
        """
        entry = self.manifest.shards[shard]
        path = self.path / entry.name
        if not path.is_file():
            raise UserError(f"{path} is missing; the manifest lists it")
        size = path.stat().st_size
        if size != entry.bytes:
            raise UserError(f"{path} has {size} bytes, the manifest says {entry.bytes}: truncated or replaced")
        if sha256_file(path) != entry.sha256:
            raise UserError(f"{path} differs from the SHA-256 in the manifest: damaged or replaced")

    def locate(self, shard: int) -> list[SampleLocation]:
        """List the samples of one tar, in order; every sample must have both members.

        Raises:
            UserError: the tar is malformed, or holds another number of samples than the manifest says.
        """
        entry = self.manifest.shards[shard]
        return _locate(self.path / entry.name, entry, shard)

    def read(self, location: SampleLocation) -> Sample:
        """Read one sample by its location.

        Raises:
            UserError: its members are malformed, or the tar is not there any more.
        """
        path = self.path / self.manifest.shards[location.shard].name
        try:
            with path.open("rb") as file:
                meta, tensors = (read_at(file, *part) for part in (location.meta, location.tensors))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        source = f"{path}: sample {location.key}"
        sample = decode_sample(meta, tensors, source)
        problem = timestep_problem(sample.timestep_K.tolist(), self.manifest.model.num_train_timesteps)
        if problem:
            raise UserError(f"{source} (pair {sample.meta.pair_id}): {problem}")
        return sample

    def samples(self, shards: Sequence[int] | None = None) -> Iterator[Sample]:
        """All samples of the given tars (default: all), in order, each tar checked before it is read."""
        for shard in range(len(self.manifest.shards)) if shards is None else shards:
            self.verify(shard)
            for location in self.locate(shard):
                yield self.read(location)
