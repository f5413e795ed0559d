"""Write shards: tars of samples, with their entries for the manifest and the index."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from webdataset import TarWriter

from smpo_common.errors import UserError
from smpo_common.files import atomic_path, sha256_file
from smpo_common.store_path import AnyPath
from smpo_schemas.manifest import ShardEntry
from smpo_schemas.shards.reader import IndexedTrajectory, locate_samples
from smpo_schemas.shards.samples import Sample, SampleMeta, encode_sample


class ShardWriter:
    """Writes one tar atomically; equal samples give equal bytes.

    Use as a context manager; an exception leaves no file. The attributes are set by a successful exit.

    Attributes:
        entry: the tar's entry in the manifest.
        trajectories: the samples' places (in shard 0) and metadata, in order.
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
        # A fixed time and no owner, so that the bytes depend on the samples alone.
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
            # A full disk may show only here: pass the error on, so that the file is not renamed into place.
            kind, error, trace = (kind, error, trace) if error else (type(closing), closing, closing.__traceback__)
        self._atomic.__exit__(kind, error, trace)

    def _describe(self) -> None:
        """Read back the tar's hash and offsets, before it is moved to its place or uploaded."""
        self.entry = ShardEntry(
            name=self._path.name,
            pairs=self._pairs,
            samples=len(self._written),
            states=sum(len(timesteps) for _, timesteps, _ in self._written),
            bytes=self._temporary.stat().st_size,
            sha256=sha256_file(self._temporary),
        )
        locations = locate_samples(self._temporary, self.entry, 0)
        self.trajectories = [
            IndexedTrajectory(location, *written) for location, written in zip(locations, self._written, strict=True)
        ]
