"""Writing shards."""

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
        locations = locate_samples(self._temporary, self.entry, 0)
        self.trajectories = [
            IndexedTrajectory(location, *written) for location, written in zip(locations, self._written, strict=True)
        ]
