"""Decoded pairs on their way through the rewards.

A unit of work is read and decoded as a stream of chunks, which are small enough that many are in memory at once. A
chunk is one row of Ray's: Ray cuts blocks where it likes, but never a row. Its cells are lists with an entry for each
of its input rows, and for the images of those that are scored, so that nobody copies pixels into Python objects.

Nothing here imports torch: decoding workers stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from smpo_pipeline.decoder import worker_decoder
from smpo_pipeline.images import ImageRejectedError
from smpo_pipeline.jobs.guard import Guard
from smpo_pipeline.jobs.ledger import Ledger
from smpo_pipeline.jobs.prepare import bytes_of, cell, read_ranges, reading_words, values_of
from smpo_schemas.pairs import Pair, PairColumns, PairRejectedError, RowRange, image_id
from smpo_schemas.scores import IMAGE_IDS
from smpo_schemas.store import AnyPath

CHUNK_BYTES = 64 << 20
"""Of decoded images in a chunk: 21 of 1024 pixels; but never less than one pair."""

CHUNK_IMAGES = 64

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


def prepare_chunks(
    table: pa.Table, units: Sequence[Sequence[RowRange]], columns: Mapping[AnyPath, PairColumns], ledger: Ledger
) -> Iterator[pa.Table]:
    """Read, decode and cut the unit that a one-row ``table`` names; ``columns`` are those of each file."""
    unit = table["unit"][0].as_py()
    with Guard(ledger).working(("read", unit), reading_words(units[unit])):
        yield from cut_chunks(unit, read_ranges(units[unit], [columns[part.path] for part in units[unit]]))


def cut_chunks(unit: int, rows: Iterable[tuple[str, Pair | PairRejectedError]]) -> Iterator[pa.Table]:
    """Decode a unit's rows and cut them into chunks.

    Where the cuts are depends on the rows alone. There is at least one chunk, and the last one says that it is the
    last.
    """
    number, chunk = 0, _Building()
    for source, pair in rows:
        entry, images = _decode(source, pair)
        if not chunk.has_room(images):
            yield chunk.finish(unit, number, last=False)
            number, chunk = number + 1, _Building()
        chunk.add(entry, images)
    yield chunk.finish(unit, number, last=True)


class _Building:
    """A chunk that is being filled; its pixels are copied once, into what becomes the cell."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []
        self._images: list[tuple[int, int, str]] = []
        self._pixels, self._ends = bytearray(), [0]

    def has_room(self, images: Sequence[np.ndarray]) -> bool:
        size = len(self._pixels) + sum(image.nbytes for image in images)
        fits = size <= CHUNK_BYTES and len(self._images) + len(images) <= CHUNK_IMAGES
        return fits or not self._images

    def add(self, entry: dict[str, Any], images: Sequence[np.ndarray]) -> None:
        self._entries.append(entry)
        for image in images:
            height, width, _ = image.shape
            self._images.append((height, width, entry["prompt"]))
            self._pixels += image.data
            self._ends.append(len(self._pixels))

    def finish(self, unit: int, number: int, *, last: bool) -> pa.Table:
        cells = {"unit": pa.array([unit]), "chunk": pa.array([number]), "last": pa.array([last])}
        table = pa.Table.from_pylist(self._entries, schema=ROWS)
        cells |= {name: cell(table[name].combine_chunks()) for name in ROWS.names}
        buffers = [None, pa.py_buffer(np.array(self._ends, np.int64)), pa.py_buffer(self._pixels)]
        pixels = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self._images), buffers)
        heights, widths, prompts = zip(*self._images, strict=True) if self._images else ((), (), ())
        sizes = (pa.array(heights, pa.int64()), pa.array(widths, pa.int64()))
        columns = (pixels, *sizes, pa.array(prompts, pa.string()))
        return pa.table(cells | {name: cell(column) for name, column in zip(_IMAGES, columns, strict=True)})


def _decode(source: str, pair: Pair | PairRejectedError) -> tuple[dict[str, Any], list[np.ndarray]]:
    if isinstance(pair, PairRejectedError):
        return {"source": source, "pair_id": pair.pair_id, "reason": str(pair)}, []
    entry = {
        "source": source,
        "pair_id": pair.pair_id,
        "prompt": pair.prompt,
        "label": pair.label,
        "annotator": pair.annotator,
        **dict(zip(IMAGE_IDS, map(image_id, (pair.image_0, pair.image_1)), strict=True)),
    }
    try:
        return entry, [worker_decoder().decode(data) for data in (pair.image_0, pair.image_1)]
    except ImageRejectedError as reason:
        return entry | {"reason": str(reason)}, []


def images_of(chunk: pa.Table) -> Iterator[tuple[Image.Image, str]]:
    """The images of a chunk, in order (image_0 and image_1 of its first pair, ...), each with its prompt."""
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
    return values_of(chunk, f"score {name}").to_numpy().reshape(-1, 2)


def failures_of(chunk: pa.Table, name: str) -> list[str | None]:
    """Why a reward could say nothing of a pair that has images: of each of them a reason, or None."""
    reasons = values_of(chunk, f"failed {name}").to_pylist()
    return [first or second for first, second in zip(reasons[::2], reasons[1::2], strict=True)]
