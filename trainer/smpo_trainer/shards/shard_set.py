"""Several directories of shards, joined into one data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from smpo_common.errors import UserError
from smpo_common.files import sha256_file
from smpo_models.noise_schedules.transition import StochasticSteps
from smpo_schemas.manifest import MANIFEST_FILE, TEXT_FOLDER, ModelInfo, TextFile
from smpo_schemas.scoring.scores import RewardStatistics
from smpo_schemas.shards.index import IndexedTrajectory, indexed_trajectories
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.text import StoredText
from smpo_trainer.shards.fetch import ShardSource, open_source
from smpo_trainer.shards.text import TextOfShards

_SAME = {
    "reference": "the reference denoiser",
    "scheduler": "the noise schedule",
    "text": "the text encoders",
    "kind": "the model family",
    "embedded_guidance": "--embedded-guidance",
}
"""Fields of the manifest's model that all directories must share, with their names in errors."""


@dataclass(frozen=True)
class ShardSet:
    """Directories with the same reference, noise schedule and text encoders; their inverting denoisers may differ."""

    sources: tuple[ShardSource, ...]

    @property
    def directories(self) -> tuple[ShardDirectory, ...]:
        """The directory of each source."""
        return tuple(source.directory for source in self.sources)

    @property
    def places(self) -> tuple[tuple[ShardSource, int], ...]:
        """(source, number within the source) of every shard; shard numbers of the set index this tuple."""
        return tuple(
            (source, number) for source in self.sources for number in range(len(source.directory.manifest.shards))
        )

    @property
    def text_files(self) -> tuple[tuple[ShardSource, TextFile], ...]:
        """Source and entry of every file of stored text; they are numbered after the shards."""
        return tuple(
            (source, file)
            for source in self.sources
            for file in (source.directory.manifest.text.files if source.directory.manifest.text else ())
        )

    @cached_property
    def text(self) -> TextOfShards | None:
        """The stored embeddings of the prompts, or None if a directory has none: prompts must then be encoded.

        Raises:
            UserError: an index of them is missing or damaged.
        """
        entries = [directory.manifest.text for directory in self.directories]
        texts = [
            StoredText(directory.path / TEXT_FOLDER, entry)
            for directory, entry in zip(self.directories, entries, strict=True)
            if entry
        ]
        return TextOfShards(texts, len(self.places)) if len(texts) == len(entries) else None

    @property
    def model(self) -> ModelInfo:
        """The model of the shards; ``id``, ``inverting_denoiser`` and ``vae`` are those of the first directory."""
        return self.directories[0].manifest.model

    def stochastic_steps(self) -> StochasticSteps:
        """Return the steps of the sampler that the pairs are draws of, the same in all directories.

        Raises:
            UserError: a directory holds no such pairs, or pairs of other steps.
        """
        found: list[StochasticSteps] = []
        for source in self.sources:
            manifest = source.directory.manifest
            if manifest.steps is None:
                raise UserError(
                    f"--timestep-weighting transition: --shards {source.name} have states of source "
                    f"{manifest.inversion.source}; it is for step pairs, which `smpo-pipeline steps` makes"
                )
            found.append(StochasticSteps(tuple(manifest.steps.grid), manifest.inversion.eta))
            if found[0] != found[-1]:
                raise UserError(
                    f"--timestep-weighting transition: --shards {self.sources[0].name} and {source.name} differ in the "
                    "steps of the sampler (--steps, --eta); draw the pairs of both with the same steps"
                )
        return found[0]

    def image_sizes(self) -> set[tuple[int, int]]:
        """Return height and width of the inverted images."""
        sizes: set[tuple[int, int]] = set()
        for directory in self.directories:
            manifest = directory.manifest
            sizes |= {(bucket.height, bucket.width) for bucket in manifest.buckets} or {(manifest.resolution,) * 2}
        return sizes

    def manifest_hashes(self) -> list[str]:
        """Return the SHA-256 of each manifest, which identifies the data wherever they are stored."""
        return [sha256_file(directory.path / MANIFEST_FILE) for directory in self.directories]

    @property
    def encodes_empty_prompt(self) -> bool:
        """Whether a dropped prompt has the text encoders' embedding of an empty text; see ``invert --empty-prompt``."""
        return _empty_prompt(self.directories[0]) == "encoded"

    def trajectories(self) -> Iterator[tuple[int, IndexedTrajectory]]:
        """Yield all trajectories in order, each with its shard.

        Raises:
            UserError: an index or a tar is damaged.
        """
        first = 0
        for source in self.sources:
            if source.remote and source.directory.manifest.index is None:
                raise UserError(
                    f"--shards {source.name} has no index.parquet; invert again, or copy the shards to a local disk"
                )
            for trajectory in indexed_trajectories(source.directory):
                yield first + trajectory.location.shard, trajectory
            first += len(source.directory.manifest.shards)

    def reward_statistics(self) -> dict[str, RewardStatistics]:
        """Return the statistics, over all directories, of the rewards that all of them have.

        Raises:
            UserError: directories have different models for a reward.
        """
        per_directory = [directory.manifest.rewards for directory in self.directories]
        names = [name for name in per_directory[0] if all(name in rewards for rewards in per_directory)]
        return {name: self._joined(name, per_directory) for name in names}

    def _joined(self, name: str, per_directory: Sequence[Mapping[str, RewardStatistics]]) -> RewardStatistics:
        parts = [rewards[name] for rewards in per_directory]
        for directory, part in zip(self.directories, parts, strict=True):
            if part.fingerprint != parts[0].fingerprint:
                raise UserError(
                    f"--shards {self.directories[0].path} and {directory.path} have different models for the reward "
                    f"{name!r} ({parts[0].model}, {part.model}); score both with one model and use --scores"
                )
        # Only minimum and maximum are used, for one scale over the whole data set.
        extremes = {"min": min(part.min for part in parts), "max": max(part.max for part in parts)}
        return parts[0].model_copy(update=extremes)


def _empty_prompt(directory: ShardDirectory) -> str:
    return directory.manifest.inversion.empty_prompt


def open_shards(names: Sequence[str], cache: Path) -> ShardSet:
    """Read the manifests of folders or URLs, with ``cache`` for fetched files.

    Raises:
        UserError: a directory has no valid manifest, is named twice, or does not fit the first one.
    """
    sources = tuple(open_source(name, cache) for name in names)
    resolved = [source.folder.resolve() for source in sources]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise UserError(f"--shards names {names[index]} twice")
    first = sources[0]
    for other in sources[1:]:
        for field, description in _SAME.items():
            if getattr(other.directory.manifest.model, field) != getattr(first.directory.manifest.model, field):
                raise UserError(
                    f"--shards {first.name} and {other.name} differ in {description}; invert both with the same "
                    "model and the same flags for it"
                )
        if _empty_prompt(other.directory) != _empty_prompt(first.directory):
            raise UserError(
                f"--shards {first.name} and {other.name} differ in --empty-prompt; invert both with the same value"
            )
    return ShardSet(sources)
