"""What a finished output folder holds, by the record that its stage wrote last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from smpo_common.errors import UserError
from smpo_models.sampling import sampling_in_words
from smpo_models.sharing.card import shared_name
from smpo_schemas.generation.candidates import CANDIDATES_FILE, read_candidates
from smpo_schemas.generation.selection import PAIRS_FILE, SCORES_FOLDER, SELECTION_FILE, read_selection
from smpo_schemas.manifest import MANIFEST_FILE, TEXT_FOLDER, read_manifest
from smpo_schemas.rejects import REJECTS_FILE
from smpo_schemas.scoring.scores import SCORES_FILE, RewardStatistics, read_scores_info
from smpo_schemas.shards.text import TEXT_INDEX

Facts = list[tuple[str, object]]


@dataclass(frozen=True)
class Contents:
    """A data set to share.

    Attributes:
        kind: of output, for the title.
        introduction: what it is, in a sentence.
        data_files: pattern of the files with the rows, for the hub's viewer.
        pairs: number of pairs.
        facts: name and value of what decided the content.
        usage: the command that takes it, with ``DATA`` for its place.
        files: all files, by path in the folder.
    """

    kind: str
    introduction: str
    data_files: str
    pairs: int
    facts: Facts
    usage: str
    files: dict[str, Path]


def read_contents(folder: Path) -> Contents:
    """Recognise and describe an output of ``invert``, ``select``, ``score`` or ``generate``.

    Raises:
        UserError: it is none, or unfinished, or a file that its record names is missing.
    """
    for marker, reader in _READERS.items():
        if (folder / marker).is_file():
            return reader(folder)
    raise UserError(
        f"{folder} holds no finished output: none of {', '.join(_READERS)} (of `smpo-pipeline`), nor training.json (of "
        "`smpo-train`)"
    )


def _shards(folder: Path) -> Contents:
    manifest = read_manifest(folder)
    inversion, totals = manifest.inversion, manifest.totals
    names = [MANIFEST_FILE, *(shard.name for shard in manifest.shards)]
    names += [manifest.index.name] if manifest.index else []
    if manifest.text:
        names += [f"{TEXT_FOLDER}/{name}" for name in (TEXT_INDEX, *(file.name for file in manifest.text.files))]
    facts: Facts = [
        ("pairs", f"{totals.pairs:,}; {totals.rejected:,} of the input were rejected"),
        ("states", f"{totals.states:,}, of {totals.samples:,} trajectories"),
        ("model", f"{shared_name(manifest.model.id)} ({manifest.model.kind})"),
        ("resolution", manifest.resolution),
        ("source of the states", inversion.source),
        ("timesteps", f"{inversion.steps}, {inversion.timesteps}"),
        ("seed", manifest.seed),
        *_rewards(manifest.rewards),
    ]
    return Contents(
        "training states",
        "Latents of pairs of images and of the noise that a frozen diffusion model makes them from, with its errors.",
        "shard-*.tar",
        totals.pairs,
        facts,
        f"smpo-train --shards DATA --model {shared_name(manifest.model.id)} --out tuned",
        _existing(folder, names, REJECTS_FILE),
    )


def _scores(folder: Path) -> Contents:
    info = read_scores_info(folder)
    facts: Facts = [("pairs", f"{info.scored:,}; {info.rejected:,} were rejected"), *_rewards(info.rewards)]
    names = [SCORES_FILE, *(part.name for part in info.parts)]
    return Contents(
        "scores",
        "Scores of pairs of images by reward models; the images are not in it.",
        "scores-*.parquet",
        info.scored,
        facts,
        "smpo-pipeline invert --pairs PAIRS --scores DATA --model MODEL --out shards",
        _existing(folder, names, REJECTS_FILE),
    )


def _selection(folder: Path) -> Contents:
    info = read_selection(folder)
    settings = info.settings
    weights = ", ".join(f"{name} {reward.weight:.3g}" for name, reward in settings.rewards.items())
    facts: Facts = [
        ("pairs", f"{info.pairs:,}, of {info.images:,} images of {info.prompts:,} prompts"),
        ("selected by", settings.by),
        ("rewards", weights or "none"),
        ("judge", settings.judge or "none"),
        ("seed", settings.seed),
    ]
    scores = _scores(folder / SCORES_FOLDER).files
    return Contents(
        "selected pairs",
        "Pairs of generated images, with the scores by which they were selected in `scores/`.",
        PAIRS_FILE,
        info.pairs,
        facts,
        "smpo-pipeline invert --pairs DATA --scores DATA/scores --model MODEL --out shards",
        _existing(folder, [SELECTION_FILE, PAIRS_FILE, *(f"{SCORES_FOLDER}/{name}" for name in scores)], REJECTS_FILE),
    )


def _candidates(folder: Path) -> Contents:
    record = read_candidates(folder)
    facts: Facts = [
        ("images", f"{record.images:,} of {record.prompts:,} prompts, {record.resolution} pixels"),
        ("model", f"{shared_name(record.model.id)} ({record.model.kind})"),
        ("sampling", sampling_in_words(record.sampler, record.steps, record.guidance_scale)),
        ("seed", record.seed),
    ]
    names = [CANDIDATES_FILE, *(part.name for part in record.parts)]
    names += [part.kept.name for part in record.parts if part.kept]
    return Contents(
        "candidates",
        "Images that a model made of each prompt, two to a row.",
        "candidates-*.parquet",
        sum(part.rows for part in record.parts),
        facts,
        "smpo-pipeline score --pairs DATA --reward pickscore --out scores",
        _existing(folder, names, REJECTS_FILE),
    )


_READERS: dict[str, Callable[[Path], Contents]] = {
    MANIFEST_FILE: _shards,
    SELECTION_FILE: _selection,
    SCORES_FILE: _scores,
    CANDIDATES_FILE: _candidates,
}


def _rewards(rewards: dict[str, RewardStatistics]) -> Iterator[tuple[str, str]]:
    for name, reward in rewards.items():
        yield f"reward {name}", f"{shared_name(reward.model)}; {reward.min:.4g} .. {reward.max:.4g} {reward.unit}"


def _existing(folder: Path, names: Iterable[str], optional: str) -> dict[str, Path]:
    """Return the files by name, with the optional one if it is there.

    Raises:
        UserError: one is missing.
    """
    files = {name: folder / name for name in names}
    missing = next((name for name, path in files.items() if not path.is_file()), None)
    if missing:
        raise UserError(f"{folder} has no {missing}, which its record names")
    return {**files, **({optional: folder / optional} if (folder / optional).is_file() else {})}
