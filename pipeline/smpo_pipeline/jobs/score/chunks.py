"""Chunks: decoded pairs on their way through the rewards.

A unit is read and decoded as a stream of chunks, small enough that many fit in memory at once. A chunk is one row
(:mod:`smpo_pipeline.jobs.cells`), whose cells have an entry for each input row, or for each image to score.

An image that several pairs of a chunk show under one prompt is stored once. Where pairs come from rankings, or the
preferred image is compared again, this saves most of the decoding and scoring.

Nothing here imports torch: decoding workers stay small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import worker_decoder
from smpo_pipeline.jobs.cells import byte_views, bytes_array, cell_values, list_cell
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.reading import PAIR_FIELDS, Layouts, describe_reading, pair_fields, read_unit
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.pairs import Pair, PairRejectedError, RowRange
from smpo_schemas.scoring.scores import IMAGE_IDS

CHUNK_BYTES = 64 << 20
"""Decoded images of a chunk, at most: 21 of 1024 x 1024 pixels. A pair that is larger has a chunk of its own."""
# Images are shared within a chunk, not beyond it: otherwise batches, and so rounding, would depend on which worker had
# which chunk.

ROWS = pa.schema([*PAIR_FIELDS, ("reason", pa.string())])
"""Cells with one entry per input row; ``reason`` is why it is not scored, or null."""

_IMAGES = ("pixels", "height", "width", "image_prompt")
"""Cells with one entry per image: raw uint8 RGB, and the prompt that it is scored under."""

_SHOWN = "shown"
"""Cell with two entries per scored pair: the positions of its images in the chunk."""


def prepare_chunks(
    table: pa.Table, units: Sequence[Sequence[RowRange]], layouts: Layouts, work_log: WorkLog
) -> Iterator[pa.Table]:
    """Read, decode and cut the unit that a one-row ``table`` names."""
    unit = table["unit"][0].as_py()
    with CrashGuard(work_log).working(("read", unit), describe_reading(units[unit])):
        yield from cut_chunks(unit, read_unit(units[unit], layouts))


def cut_chunks(unit: int, rows: Iterable[tuple[str, Pair | PairRejectedError]]) -> Iterator[pa.Table]:
    """Decode a unit's rows and cut them into chunks.

    The cuts depend on the rows alone. There is at least one chunk, and the last one is marked.
    """
    number, chunk = 0, _ChunkBuilder()
    for source, pair in rows:
        entry, images = _decode(source, pair, chunk.pixels)
        if not chunk.has_room(entry, images):
            yield chunk.finish(unit, number, last=False)
            number, chunk = number + 1, _ChunkBuilder()
        chunk.add(entry, images)
    yield chunk.finish(unit, number, last=True)


class _ChunkBuilder:
    """Collects rows and their images until the chunk is full."""

    def __init__(self) -> None:
        self.pixels: dict[str, np.ndarray] = {}
        """Decoded images by id, also those of rejected pairs."""
        self._entries: list[dict[str, Any]] = []
        self._images: dict[tuple[str, str], int] = {}
        """Position of each image to score, by its id and prompt."""
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
        cells |= {name: list_cell(table[name].combine_chunks()) for name in ROWS.names}
        cells[_SHOWN] = list_cell(pa.array(self._shown, pa.int64()))
        images, prompts = [self.pixels[name] for name, _ in self._images], [prompt for _, prompt in self._images]
        # The only copy of all pixels. Unlike bytes, numpy asks the kernel for huge pages.
        joined = np.concatenate([np.empty(0, np.uint8), *(image.ravel() for image in images)])
        pixels = bytes_array(joined, np.cumsum([0, *(image.nbytes for image in images)], dtype=np.int64))
        sizes = (pa.array([image.shape[axis] for image in images], pa.int64()) for axis in (0, 1))
        columns = (pixels, *sizes, pa.array(prompts, pa.string()))
        return pa.table(cells | {name: list_cell(column) for name, column in zip(_IMAGES, columns, strict=True)})


def _decode(
    source: str, pair: Pair | PairRejectedError, known: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a row's entry, and its pixels by image id, none if it is rejected; ``known`` images are not decoded."""
    if isinstance(pair, PairRejectedError):
        return {"source": source, "pair_id": pair.pair_id, "reason": str(pair)}, {}
    entry = pair_fields(pair, source)
    images: dict[str, np.ndarray] = {}
    try:
        for column, data in zip(IMAGE_IDS, (pair.image_0, pair.image_1), strict=True):
            name = entry[column]
            if name not in images:
                images[name] = known[name] if name in known else worker_decoder().decode(data)
    except ImageRejectedError as reason:
        return entry | {"reason": str(reason)}, {}
    return entry, images


def chunk_images(chunk: pa.Table) -> Iterator[tuple[Image.Image, str]]:
    """Yield each image of a chunk once, with its prompt, in the order of first use."""
    fields = [cell_values(chunk, name).to_pylist() for name in ("height", "width", "image_prompt")]
    for height, width, prompt, pixels in zip(*fields, byte_views(cell_values(chunk, "pixels")), strict=True):
        yield Image.fromarray(pixels.reshape(height, width, 3)), prompt


def with_scores(chunk: pa.Table, scores: Mapping[str, np.ndarray], failed: Mapping[int, str] | None = None) -> pa.Table:
    """Add two cells per reward: the score of each image, and the reason if it has none.

    Args:
        chunk: as :func:`cut_chunks` yields it.
        scores: float64 [N] per reward, in the order of :func:`chunk_images`.
        failed: reasons by position of the image.
    """
    for name, values in scores.items():
        chunk = chunk.append_column(f"score {name}", list_cell(pa.array(values, pa.float64())))
        reasons = [(failed or {}).get(number) for number in range(len(values))]
        chunk = chunk.append_column(f"failed {name}", list_cell(pa.array(reasons, pa.string())))
    return chunk


def without_images(chunk: pa.Table) -> pa.Table:
    """Drop the images, once every reward has scored them."""
    return chunk.drop_columns(list(_IMAGES))


def pair_scores(chunk: pa.Table, name: str) -> np.ndarray:
    """Return a reward's scores of the P pairs that have images: float64 [P, 2]."""
    return cell_values(chunk, f"score {name}").to_numpy()[_shown(chunk)]


def pair_failures(chunk: pa.Table, name: str) -> list[str | None]:
    """Return, for each pair that has images, why the reward has no score for it, or None."""
    reasons = cell_values(chunk, f"failed {name}").to_pylist()
    return [reasons[first] or reasons[second] for first, second in _shown(chunk)]


def _shown(chunk: pa.Table) -> np.ndarray:
    """Return the positions of the images that the P pairs show: int64 [P, 2]."""
    return cell_values(chunk, _SHOWN).to_numpy().reshape(-1, 2)
