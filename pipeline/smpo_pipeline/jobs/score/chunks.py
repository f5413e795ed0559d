"""Decoded pairs on their way through the rewards.

A unit of work is read and decoded as a stream of chunks, which are small enough that many are in memory at once. A
chunk is one row of Ray's: Ray cuts blocks where it likes, but never a row. Its cells are lists with an entry for each
of its input rows, and for the images of those that are scored, so that nobody copies pixels into Python objects.

An image that several pairs of a chunk show under one prompt is in it once: where pairs come from rankings, or the
better image stays to meet the next, most of decoding and scoring is saved.

Nothing here imports torch: decoding workers stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from smpo_common.store_path import AnyPath
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import worker_decoder
from smpo_pipeline.jobs.faults.crashes import CrashGuard, WorkLog
from smpo_pipeline.jobs.prepare import bytes_of, cell, read_ranges, reading_words, values_of
from smpo_schemas.pairs import Pair, PairColumns, PairRejectedError, RowRange, image_id
from smpo_schemas.scores import IMAGE_IDS

CHUNK_BYTES = 64 << 20
"""Of decoded images in a chunk: 21 of 1024 pixels; but never less than one pair."""
# An image is scored once per chunk, not once per run: with scores kept beyond a chunk, batches, and so rounding, would
# depend on which worker had which chunk.

ROWS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("label", pa.float32()),
        ("annotator", pa.string()),
        *((name, pa.string()) for name in IMAGE_IDS),
        ("source", pa.string()),
        ("reason", pa.string()),
    ]
)
"""One entry an input row; ``reason`` is why it is not scored, or null."""

_IMAGES = ("pixels", "height", "width", "image_prompt")
"""One entry an image: raw uint8 RGB, and the prompt that it is scored under."""

_SHOWN = "shown"
"""Two entries a pair that is scored: the places of its images among the chunk's."""


def prepare_chunks(
    table: pa.Table, units: Sequence[Sequence[RowRange]], columns: Mapping[AnyPath, PairColumns], work_log: WorkLog
) -> Iterator[pa.Table]:
    """Read, decode and cut the unit that a one-row ``table`` names; ``columns`` are those of each file."""
    unit = table["unit"][0].as_py()
    with CrashGuard(work_log).working(("read", unit), reading_words(units[unit])):
        yield from cut_chunks(unit, read_ranges(units[unit], [columns[part.path] for part in units[unit]]))


def cut_chunks(unit: int, rows: Iterable[tuple[str, Pair | PairRejectedError]]) -> Iterator[pa.Table]:
    """Decode a unit's rows and cut them into chunks.

    Where the cuts are depends on the rows alone. There is at least one chunk, and the last one says that it is the
    last.
    """
    number, chunk = 0, _Building()
    for source, pair in rows:
        entry, images = _decode(source, pair, chunk.pixels)
        if not chunk.has_room(entry, images):
            yield chunk.finish(unit, number, last=False)
            number, chunk = number + 1, _Building()
        chunk.add(entry, images)
    yield chunk.finish(unit, number, last=True)


class _Building:
    """A chunk that is being filled."""

    def __init__(self) -> None:
        self.pixels: dict[str, np.ndarray] = {}
        """Of the images that were decoded for it, by id."""
        self._entries: list[dict[str, Any]] = []
        self._images: dict[tuple[str, str], int] = {}
        """The place of each that is scored, by its id and prompt."""
        self._shown: list[int] = []

    def has_room(self, entry: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> bool:
        pixels = {**self.pixels, **images}
        keys = self._images.keys() | {(name, entry["prompt"]) for name in images}
        return not self._images or sum(pixels[name].nbytes for name, _ in keys) <= CHUNK_BYTES

    def add(self, entry: dict[str, Any], images: Mapping[str, np.ndarray]) -> None:
        self._entries.append(entry)
        self.pixels |= images
        for key in [(entry[name], entry["prompt"]) for name in IMAGE_IDS] if images else ():
            self._shown.append(self._images.setdefault(key, len(self._images)))

    def finish(self, unit: int, number: int, *, last: bool) -> pa.Table:
        cells = {"unit": pa.array([unit]), "chunk": pa.array([number]), "last": pa.array([last])}
        table = pa.Table.from_pylist(self._entries, schema=ROWS)
        cells |= {name: cell(table[name].combine_chunks()) for name in ROWS.names}
        cells[_SHOWN] = cell(pa.array(self._shown, pa.int64()))
        images, prompts = [self.pixels[name] for name, _ in self._images], [prompt for _, prompt in self._images]
        # The one copy of all pixels, into what becomes the cell. Unlike bytes, numpy asks the kernel for huge pages.
        joined = np.concatenate([np.empty(0, np.uint8), *(image.ravel() for image in images)])
        ends = np.cumsum([0, *(image.nbytes for image in images)], dtype=np.int64)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(joined)]
        pixels = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(images), buffers)
        sizes = (pa.array([image.shape[axis] for image in images], pa.int64()) for axis in (0, 1))
        columns = (pixels, *sizes, pa.array(prompts, pa.string()))
        return pa.table(cells | {name: cell(column) for name, column in zip(_IMAGES, columns, strict=True)})


def _decode(
    source: str, pair: Pair | PairRejectedError, known: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a row says, and its images by id, none where it is rejected; those that are ``known`` are not decoded."""
    if isinstance(pair, PairRejectedError):
        return {"source": source, "pair_id": pair.pair_id, "reason": str(pair)}, {}
    files = [(image_id(data), data) for data in (pair.image_0, pair.image_1)]
    entry = {
        "source": source,
        "pair_id": pair.pair_id,
        "prompt": pair.prompt,
        "label": pair.label,
        "annotator": pair.annotator,
        **{column: name for column, (name, _) in zip(IMAGE_IDS, files, strict=True)},
    }
    images: dict[str, np.ndarray] = {}
    try:
        for name, data in files:
            if name not in images:
                images[name] = known[name] if name in known else worker_decoder().decode(data)
    except ImageRejectedError as reason:
        return entry | {"reason": str(reason)}, {}
    return entry, images


def images_of(chunk: pa.Table) -> Iterator[tuple[Image.Image, str]]:
    """The images of a chunk, each once, in the order in which they are first shown, each with its prompt."""
    others = [values_of(chunk, name).to_pylist() for name in ("height", "width", "image_prompt")]
    for height, width, prompt, pixels in zip(*others, bytes_of(values_of(chunk, "pixels")), strict=True):
        yield Image.fromarray(pixels.reshape(height, width, 3)), prompt


def with_scores(chunk: pa.Table, scores: Mapping[str, np.ndarray], failed: Mapping[int, str] | None = None) -> pa.Table:
    """The chunk with two columns a reward: the score of each image, and why it has none, by number of the image."""
    for name, values in scores.items():
        chunk = chunk.append_column(f"score {name}", cell(pa.array(values, pa.float64())))
        reasons = [(failed or {}).get(number) for number in range(len(values))]
        chunk = chunk.append_column(f"failed {name}", cell(pa.array(reasons, pa.string())))
    return chunk


def without_images(chunk: pa.Table) -> pa.Table:
    """What is left to say of a chunk once every reward has seen it."""
    return chunk.drop_columns(list(_IMAGES))


def scores_of(chunk: pa.Table, name: str) -> np.ndarray:
    """float64 [P, 2]: what a reward said of the P pairs that have images."""
    return values_of(chunk, f"score {name}").to_numpy()[_shown(chunk)]


def failures_of(chunk: pa.Table, name: str) -> list[str | None]:
    """Why a reward could say nothing of a pair that has images: of each of them a reason, or None."""
    reasons = values_of(chunk, f"failed {name}").to_pylist()
    return [reasons[first] or reasons[second] for first, second in _shown(chunk)]


def _shown(chunk: pa.Table) -> np.ndarray:
    """int64 [P, 2]: the numbers of the images that the P pairs show."""
    return values_of(chunk, _SHOWN).to_numpy().reshape(-1, 2)
