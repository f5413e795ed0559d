"""Units of work on their way through Ray: rows read and images decoded once, carried as Arrow tables.

A unit travels as one row whose ``table`` cell is an Arrow IPC stream. Ray cuts blocks where it likes, but never a row,
so that a unit, which is what is committed, stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from smpo_pipeline.buckets import Size, resize_pair
from smpo_pipeline.decoder import worker_decoder
from smpo_pipeline.images import ImageRejectedError
from smpo_schemas.pairs import Pair, PairColumns, PairRejectedError, RowRange, read_rows
from smpo_schemas.rejects import Reject

UNIT_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("label", pa.float32()),
        ("annotator", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("pixels_0", pa.large_binary()),
        ("pixels_1", pa.large_binary()),
        ("shape_0", pa.list_(pa.int64())),
        ("shape_1", pa.list_(pa.int64())),
        ("size", pa.list_(pa.list_(pa.int64()))),
        ("crop", pa.list_(pa.list_(pa.int64()))),
    ]
)
"""One row a pair: ``row`` is its number in the whole input, ``pixels`` raw uint8 RGB of ``shape`` [H, W, 3]."""


def to_bytes(table: pa.Table) -> bytes:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> pa.Table:
    """The table of an Arrow IPC stream, without a copy."""
    return pa.ipc.open_stream(data).read_all()


def prepare_unit(
    ranges: Sequence[RowRange], columns: Sequence[PairColumns], first_row: int, sizes: Sequence[Size], stage: str
) -> tuple[pa.Table, list[Reject]]:
    """Read one unit's rows and decode their images, each once.

    Args:
        ranges: the rows, by file.
        columns: of each range's file.
        first_row: number of the unit's first row in the whole input.
        sizes: one of these is what a pair's images are brought to.
        stage: name for the rejects.

    Returns:
        A table of :data:`UNIT_SCHEMA`, in input order, and the rows that are not in it.
    """
    rows, rejects = [], []
    for number, (source, pair) in enumerate(read_ranges(ranges, columns), start=first_row):
        try:
            if isinstance(pair, PairRejectedError):
                raise pair
            rows.append(_decode(pair, sizes) | {"source": source, "row": number})
        except PairRejectedError as reason:
            rejects.append(Reject(pair_id=reason.pair_id, source=source, stage=stage, reason=str(reason)))
        except ImageRejectedError as reason:
            rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=stage, reason=str(reason)))
    return pa.Table.from_pylist(rows, schema=UNIT_SCHEMA), rejects


def reading_words(ranges: Sequence[RowRange]) -> str:
    """What a worker does that reads a unit, for whoever has to find out why workers die of it."""
    parts = ", ".join(f"{rows.path} from row {rows.start} to {rows.stop}" for rows in ranges)
    return f"reading {parts}; is the file damaged, or the workers' memory too small?"


def read_ranges(
    ranges: Sequence[RowRange], columns: Sequence[PairColumns]
) -> Iterator[tuple[str, Pair | PairRejectedError]]:
    """The rows of a unit, in order: where each stands, and the pair or the reason why it is none."""
    for rows, names in zip(ranges, columns, strict=True):
        yield from read_rows(rows, names)


def _decode(pair: Pair, sizes: Sequence[Size]) -> dict[str, Any]:
    images = [Image.fromarray(worker_decoder().decode(data)) for data in (pair.image_0, pair.image_1)]
    resized, crops = resize_pair(images, sizes)
    row: dict[str, Any] = {
        "pair_id": pair.pair_id,
        "prompt": pair.prompt,
        "label": pair.label,
        "annotator": pair.annotator,
        "size": [[image.height, image.width] for image in images],
        "crop": [list(crop) for crop in crops],
    }
    for index, pixels in enumerate(resized):
        row |= {f"pixels_{index}": pixels.tobytes(), f"shape_{index}": list(pixels.shape)}
    return row


def pixels_of(row: dict[str, Any], index: int) -> np.ndarray:
    """uint8 [H, W, 3] of one image of a row of :data:`UNIT_SCHEMA`."""
    return np.frombuffer(row[f"pixels_{index}"], np.uint8).reshape(row[f"shape_{index}"])
