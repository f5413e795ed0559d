"""Write a toy world: its models, preference pairs and prompts."""

from __future__ import annotations

import hashlib
import io
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smpo_common.errors import UserError
from smpo_common.files import read_json, write_json
from smpo_pipeline.toy.annotators import ANNOTATORS, choose, qualities, utility
from smpo_pipeline.toy.sampling import load_pipeline, sample_images
from smpo_pipeline.toy.truth import true_reward
from smpo_pipeline.toy.world import SPLITS, captions_of
from smpo_schemas.labels import TIE

ASSETS = Path(__file__).parent / "assets"
"""The world's checkpoints, made by benchmarks/toy_world/build.py."""

ToyFamily = Literal["sd15", "sd3"]
MODELS: dict[ToyFamily, Path] = {"sd15": ASSETS / "model", "sd3": ASSETS / "model-sd3"}
"""The base models: one in the layout of Stable Diffusion 1.5, and a flow model in that of Stable Diffusion 3."""

WORLD_FILE = "world.json"
_UNFINISHED_FILE = "unfinished"
_FOLDERS = ("model", "rewards", "pairs", "prompts")
_ROWS_PER_FILE = 256
_JPEG_QUALITY = 95

Progress = Callable[[int, int], None]
"""Called with the number of pictures sampled so far and their total number."""

PAIR_SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_1_uid", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
    ]
)
"""The columns of Pick-a-Pic v2 that apply to these pairs."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """The random choices of one pair, from the world's seed and the pair's number alone."""

    caption: str
    image_seeds: tuple[int, int]
    annotator: int
    mood: float


def create_world(
    out: Path, num_pairs: int = 600, seed: int = 0, family: ToyFamily = "sd15", progress: Progress | None = None
) -> None:
    """Write a world: ``model/``, ``rewards/NAME/``, ``pairs/*.parquet``, ``prompts/SPLIT.txt``, ``world.json``.

    The pairs' pictures are samples of the base model for captions of the train split, labelled by simulated annotators.
    A pair depends on its number and the seed only, not on the number of pairs. ``world.json`` is written last. A
    finished world of the same settings is left alone; an unfinished one is replaced.

    Args:
        out: the folder; created if missing.
        num_pairs: number of preference pairs, at least 1.
        seed: of the pairs. The models and the splits are the same in every world.
        family: of the base model.
        progress: called while sampling, which takes nearly all of the time.

    Raises:
        UserError: the folder holds a world of other settings or other files, or cannot be written.
    """
    if num_pairs < 1 or seed < 0:
        raise UserError(f"a world needs at least 1 pair and a seed of 0 or more, got {num_pairs} pairs and seed {seed}")
    assets = {"model": _fingerprint(MODELS[family]), "rewards": _fingerprint(ASSETS / "rewards")}
    settings = {"seed": seed, "num_pairs": num_pairs, "family": family, "assets": assets}
    if _is_finished(out, settings):
        return
    _clear(out)
    try:
        _write_world(out, settings, MODELS[family], progress)
    except OSError as error:
        raise UserError(f"cannot write the world to {out}: {error}") from error


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    path = out / WORLD_FILE
    if not path.exists():
        return False
    stored = read_json(path)
    stored = stored if isinstance(stored, dict) else {}
    for name, value in settings.items():
        if stored.get(name) != value:
            raise UserError(
                f"{out} holds a world with {name} {stored.get(name)}, not {value}; remove it or choose another --out"
            )
    return True


def _clear(out: Path) -> None:
    """Remove an interrupted run's files; refuse to touch other files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        unfinished = out / _UNFINISHED_FILE
        for name in _FOLDERS:
            if (out / name).exists():
                if not unfinished.exists():
                    raise UserError(f"{out / name} exists but is not part of a toy world; choose another --out")
                shutil.rmtree(out / name)
        unfinished.touch()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error


def _write_world(out: Path, settings: dict[str, Any], model: Path, progress: Progress | None) -> None:
    shutil.copytree(model, out / "model")
    shutil.copytree(ASSETS / "rewards", out / "rewards")
    (out / "prompts").mkdir()
    for split in SPLITS:
        (out / "prompts" / f"{split}.txt").write_text("\n".join(captions_of(split)) + "\n", encoding="utf-8")

    draws = [_draw(settings["seed"], number) for number in range(settings["num_pairs"])]
    images_2N = _sample(out / "model", draws, progress)
    labels = _label(draws, images_2N)
    (out / "pairs").mkdir()
    rows = [
        _row(settings["seed"], number, draw, (image_0, image_1), float(label))
        for number, (draw, image_0, image_1, label) in enumerate(zip(draws, *images_2N, labels, strict=True))
    ]
    num_files = -(-len(rows) // _ROWS_PER_FILE)
    for index in range(num_files):
        part = rows[index * _ROWS_PER_FILE : (index + 1) * _ROWS_PER_FILE]
        path = out / "pairs" / f"train-{index:05d}-of-{num_files:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema=PAIR_SCHEMA), path)

    truth = [true_reward(list(images), [draw.caption for draw in draws]) for images in images_2N]
    world = {
        **settings,
        "num_prompts": {split: len(captions_of(split)) for split in SPLITS},
        "annotators": [annotator.name for annotator in ANNOTATORS],
        "num_ties": int((labels == TIE).sum()),
        "mean_true_reward": round(float(np.mean(truth)), 4),
    }
    write_json(out / WORLD_FILE, world)
    (out / _UNFINISHED_FILE).unlink()


def _draw(seed: int, number: int) -> _Draw:
    rng = np.random.default_rng([seed, number])
    first, second = (int(value) for value in rng.integers(2**62, size=2))
    return _Draw(
        caption=str(rng.choice(captions_of("train"))),
        image_seeds=(first, second),
        annotator=int(rng.integers(len(ANNOTATORS))),
        mood=float(rng.random()),
    )


def _sample(model: Path, draws: list[_Draw], progress: Progress | None) -> np.ndarray:
    """Sample both pictures of every pair: uint8 [2, N, 32, 32, 3]."""
    captions = [draw.caption for draw in draws] * 2
    seeds = [draw.image_seeds[side] for side in (0, 1) for draw in draws]

    def sampled(count: int) -> None:
        if progress is not None:
            progress(count, len(captions))

    images = sample_images(load_pipeline(model), captions, seeds, progress=sampled)
    return images.reshape(2, len(draws), *images.shape[1:])


def _label(draws: list[_Draw], images_2N: np.ndarray) -> np.ndarray:
    """Label each pair by its annotator: float64 [N]."""
    captions = [draw.caption for draw in draws]
    first, second = (qualities(list(images), captions) for images in images_2N)
    mood = np.array([draw.mood for draw in draws])
    choices_AN = np.stack([choose(utility(person, first), utility(person, second), mood) for person in ANNOTATORS])
    return choices_AN[[draw.annotator for draw in draws], np.arange(len(draws))]


def _row(seed: int, number: int, draw: _Draw, images: tuple[np.ndarray, np.ndarray], label: float) -> dict[str, Any]:
    uids = [str(uuid.uuid5(uuid.NAMESPACE_OID, f"toy {seed} {number} {side}")) for side in (0, 1)]
    return {
        "are_different": not np.array_equal(*images),
        "best_image_uid": "tie" if label == TIE else uids[0 if label == 1 else 1],
        "caption": draw.caption,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "jpg_0": _jpeg(images[0]),
        "jpg_1": _jpeg(images[1]),
        "label_0": label,
        "label_1": 1 - label,
        "ranking_id": number,
        "user_id": draw.annotator,
    }


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Full colour resolution: subsampling would blur a small shape's colour visibly.
    Image.fromarray(image).save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _fingerprint(folder: Path) -> str:
    """Return the hex SHA-256 over the names and bytes of all files in a folder and its subfolders."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
