"""Several directories of shards as one data set, if they belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smpo_schemas.errors import UserError
from smpo_schemas.files import sha256_file
from smpo_schemas.manifest import MANIFEST_FILE, ModelInfo
from smpo_schemas.scores import RewardStatistics
from smpo_schemas.shards import Sample, SampleLocation, ShardDirectory

_SAME = {
    "reference": "the reference denoiser",
    "scheduler": "the noise levels",
    "text": "the text encoders",
    "kind": "the model family",
}


@dataclass(frozen=True)
class ShardSet:
    """Directories with the same reference, noise levels and text encoders; their walkers may differ."""

    directories: tuple[ShardDirectory, ...]

    @property
    def model(self) -> ModelInfo:
        """What the shards say of their model; ``id``, ``walker`` and ``vae`` are those of the first directory."""
        return self.directories[0].manifest.model

    def manifest_hashes(self) -> list[str]:
        """SHA-256 of each manifest: what the data are, wherever they lie."""
        return [sha256_file(directory.path / MANIFEST_FILE) for directory in self.directories]

    def num_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(directory.manifest.totals.bytes for directory in self.directories)

    def samples(self, *, verify: bool) -> Iterator[tuple[int, SampleLocation, Sample]]:
        """All samples in order, each with its directory's index and its location; every member is validated.

        Args:
            verify: also check every tar's SHA-256, before its first sample.
        """
        for index, directory in enumerate(self.directories):
            for shard in range(len(directory.manifest.shards)):
                if verify:
                    directory.verify(shard)
                for location in directory.locate(shard):
                    yield index, location, directory.read(location)

    def reward_statistics(self) -> dict[str, RewardStatistics]:
        """Statistics of the rewards that all directories hold, over all of them.

        Raises:
            UserError: a reward of one name is of different models.
        """
        per_directory = [directory.manifest.rewards for directory in self.directories]
        names = [name for name in per_directory[0] if all(name in rewards for rewards in per_directory)]
        return {name: self._joined(name, per_directory) for name in names}

    def _joined(self, name: str, per_directory: Sequence[Mapping[str, RewardStatistics]]) -> RewardStatistics:
        parts = [rewards[name] for rewards in per_directory]
        for directory, part in zip(self.directories, parts, strict=True):
            if part.fingerprint != parts[0].fingerprint:
                raise UserError(
                    f"--shards {self.directories[0].path} and {directory.path}: their reward {name!r} is of different "
                    f"models ({parts[0].model}, {part.model}); score both with one model and use --scores"
                )
        # Only the extremes are used: one scale over the whole data set.
        extremes = {"min": min(part.min for part in parts), "max": max(part.max for part in parts)}
        return parts[0].model_copy(update=extremes)


def open_shards(paths: Sequence[Path]) -> ShardSet:
    """Read the manifests.

    Raises:
        UserError: a directory has no valid manifest, is named twice, or does not belong to the first one.
    """
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise UserError(f"--shards names {paths[index]} twice")
    directories = tuple(ShardDirectory(path) for path in paths)
    first = directories[0]
    for other in directories[1:]:
        for field, words in _SAME.items():
            if getattr(other.manifest.model, field) != getattr(first.manifest.model, field):
                raise UserError(
                    f"--shards {first.path} and {other.path} do not belong together: {words} differs; "
                    "invert both with the same --model and --unet"
                )
    return ShardSet(directories)
