"""Units of work on their way through Ray: rows read and images decoded once, carried as Arrow tables.

A unit travels as one row, each cell of which is a list with an entry for each of its pairs. Ray cuts blocks where it
likes, but never a row, so that a unit, which is what is committed, stays whole. Pixels are copied once, into what
becomes the cell; actors look at them where Ray holds them.

Nothing here imports torch: decoding workers start fast and stay small.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from smpo_common.store_path import AnyPath
from smpo_pipeline.images.buckets import Size, resize_pair
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import worker_decoder
from smpo_pipeline.jobs.faults.crashes import CrashGuard, WorkLog
from smpo_pipeline.jobs.record.run_record import Run
from smpo_schemas.pairs import Pair, PairColumns, PairRejectedError, RowRange, image_id, read_rows
from smpo_schemas.rejects import Reject
from smpo_schemas.scores import IMAGE_IDS

UNIT_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("label", pa.float32()),
        ("annotator", pa.string()),
        *((name, pa.string()) for name in IMAGE_IDS),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("pixels", pa.large_binary()),
        ("shape", pa.list_(pa.int64())),
        ("size", pa.list_(pa.list_(pa.int64()))),
        ("crop", pa.list_(pa.list_(pa.int64()))),
    ]
)
"""One row a pair: ``row`` is its number in the whole input, ``pixels`` raw uint8 RGB of ``shape`` [2, H, W, 3]."""


def cell(values: pa.Array) -> pa.Array:
    """A column of one row that holds all ``values``."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


def values_of(row: pa.Table, name: str) -> pa.Array:
    """The list that one cell of a one-row table holds, without a copy."""
    # combine_chunks copies, even a single one.
    return next(chunk for chunk in row[name].chunks if len(chunk)).flatten()


def bytes_of(values: pa.LargeBinaryArray) -> Iterator[np.ndarray]:
    """Each value's bytes, uint8, where they are: a scalar of Arrow's would be a copy."""
    if not len(values):
        return
    _, ends_buffer, data_buffer = values.buffers()
    ends, data = np.frombuffer(ends_buffer, np.int64)[values.offset :], np.frombuffer(data_buffer, np.uint8)
    for start, end in pairwise(ends[: len(values) + 1]):
        yield data[start:end]


def prepare_row(
    row: pa.Table,
    units: Sequence[Sequence[RowRange]],
    columns: Mapping[AnyPath, PairColumns],
    pairs_per_unit: int,
    sizes: Sequence[Size],
    stage: str,
    run: Run,
    work_log: WorkLog,
) -> pa.Table:
    """Read and decode the unit that a one-row table names, as :func:`unit_row` carries it.

    Nothing is read of a unit that is committed.
    """
    unit = row["unit"][0].as_py()
    # Asked for again, because what came of it was lost on its way to the driver: the actor knows what to say.
    ranges = [] if run.committed(unit) else units[unit]
    names = [columns[part.path] for part in ranges]
    with CrashGuard(work_log).working(("read", unit), reading_words(ranges)):
        table, rejects = prepare_unit(ranges, names, unit * pairs_per_unit, sizes, stage)
    return unit_row(unit, table, rejects)


def unit_row(unit: int, table: pa.Table, rejects: Sequence[Reject]) -> pa.Table:
    """A unit as one row: its pairs as :func:`prepare_unit` gives them, and the rows that are not among them."""
    cells = {"unit": pa.array([unit]), "rejects": pa.array([json.dumps([reject.model_dump() for reject in rejects])])}
    return pa.table(cells | {name: cell(table[name].chunk(0)) for name in UNIT_SCHEMA.names})


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
    pixels, ends = bytearray(), [0]
    for number, (source, pair) in enumerate(read_ranges(ranges, columns), start=first_row):
        try:
            if isinstance(pair, PairRejectedError):
                raise pair
            row, images = _decode(pair, sizes)
            rows.append(row | {"source": source, "row": number, "shape": [2, *images[0].shape]})
            for image in images:
                pixels += image.tobytes()
            ends.append(len(pixels))
        except PairRejectedError as reason:
            rejects.append(Reject(pair_id=reason.pair_id, source=source, stage=stage, reason=str(reason)))
        except ImageRejectedError as reason:
            rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=stage, reason=str(reason)))
    table = pa.Table.from_pylist(rows, schema=UNIT_SCHEMA)
    # Through Python's rows every pixel would be copied twice more.
    buffers = [None, pa.py_buffer(np.array(ends, np.int64)), pa.py_buffer(pixels)]
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), buffers)
    return table.set_column(table.schema.get_field_index("pixels"), "pixels", column), rejects


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


def _decode(pair: Pair, sizes: Sequence[Size]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """What a row says of a pair, and both images' pixels, which are of one size."""
    images = [Image.fromarray(worker_decoder().decode(data)) for data in (pair.image_0, pair.image_1)]
    resized, crops = resize_pair(images, sizes)
    row: dict[str, Any] = {
        "pair_id": pair.pair_id,
        "prompt": pair.prompt,
        "label": pair.label,
        "annotator": pair.annotator,
        **{name: image_id(data) for name, data in zip(IMAGE_IDS, (pair.image_0, pair.image_1), strict=True)},
        "size": [[image.height, image.width] for image in images],
        "crop": [list(crop) for crop in crops],
    }
    return row, resized


def pairs_of(row: pa.Table) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Of each pair of a unit what it says of it, and uint8 [2, H, W, 3], a view of what the table holds."""
    others = pa.table({name: values_of(row, name) for name in UNIT_SCHEMA.names if name != "pixels"})
    for pair, pixels in zip(others.to_pylist(), bytes_of(values_of(row, "pixels")), strict=True):
        yield pair, pixels.reshape(pair.pop("shape"))
