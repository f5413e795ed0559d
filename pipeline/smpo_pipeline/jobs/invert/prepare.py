"""Prepare units for the model actors of ``invert``: read their rows, decode, resize and crop their images, once.

A unit travels as one row (:mod:`smpo_pipeline.jobs.cells`), whose cells have an entry for each of its pairs. Pixels
are copied once, into the cell; actors read them in Ray's object store. Where ``generate`` kept latents, they take the
place of pixels.

Nothing here imports torch, except to read latents: decoding workers start fast and stay small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from smpo_pipeline.images.buckets import Size, resize_pair
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import worker_decoder
from smpo_pipeline.jobs.cells import byte_views, bytes_array, cell_values, list_cell
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.reading import PAIR_FIELDS, Layouts, describe_reading, pair_fields, read_unit
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.pairs import Pair, PairRejectedError, RowRange
from smpo_schemas.rejects import Reject

if TYPE_CHECKING:
    from smpo_pipeline.inversion.generated import KeptSource

STAGE = "invert"

UNIT_SCHEMA = pa.schema(
    [
        *PAIR_FIELDS,
        ("row", pa.int64()),
        ("content", pa.large_binary()),
        ("shape", pa.list_(pa.int64())),
        ("size", pa.list_(pa.list_(pa.int64()))),
        ("crop", pa.list_(pa.list_(pa.int64()))),
        ("noise", pa.list_(pa.struct([("seed", pa.int64()), ("index", pa.int64()), ("dtype", pa.string())]))),
        ("timesteps", pa.list_(pa.float64())),
    ]
)
"""One row per pair: ``row`` is its number in the whole input, ``content`` raw uint8 RGB of ``shape`` [2, H, W, 3],
``size`` and ``crop`` are (height, width) as decoded and the crop's (top, left), of each image. With kept latents
``content`` is float32, and ``noise`` and ``timesteps`` are not null
(:class:`smpo_pipeline.inversion.generated.GeneratedPair`)."""

_Load = Callable[[Pair], tuple[dict[str, Any], Sequence[np.ndarray]]]
"""Values of fields beyond a pair's own, and the arrays that are its content, one after the other."""


def prepare_row(
    row: pa.Table,
    units: Sequence[Sequence[RowRange]],
    layouts: Layouts,
    pairs_per_unit: int,
    sizes: Sequence[Size],
    kept: KeptSource | None,
    run: Run,
    work_log: WorkLog,
) -> pa.Table:
    """Prepare the unit that a one-row table names; return it as :func:`unit_row` packs it."""
    unit = row["unit"][0].as_py()
    # Ray asks again for a committed unit whose record was lost on its way to the driver. The actor then returns the
    # record from disk, so nothing is read here.
    ranges = [] if run.committed(unit) else units[unit]
    with CrashGuard(work_log).working(("read", unit), describe_reading(ranges)):
        table, rejects = prepare_unit(ranges, layouts, unit * pairs_per_unit, sizes, kept)
    return unit_row(unit, table, rejects)


def unit_row(unit: int, table: pa.Table, rejects: Sequence[Reject]) -> pa.Table:
    """Pack a unit into one row, from what :func:`prepare_unit` returns."""
    cells = {"unit": pa.array([unit]), "rejects": pa.array([json.dumps([reject.model_dump() for reject in rejects])])}
    return pa.table(cells | {name: list_cell(table[name].chunk(0)) for name in UNIT_SCHEMA.names})


def prepare_unit(
    ranges: Sequence[RowRange],
    layouts: Layouts,
    first_row: int,
    sizes: Sequence[Size],
    kept: KeptSource | None = None,
) -> tuple[pa.Table, list[Reject]]:
    """Read a unit's rows and decode their images, or read their latents.

    Args:
        ranges: the rows, by file.
        layouts: of each file.
        first_row: number of the unit's first row in the whole input.
        sizes: image sizes to choose from, one for both images of a pair.
        kept: where latents are that take the place of images; None: images are decoded.

    Returns:
        A table of :data:`UNIT_SCHEMA`, in input order, and the rejected rows.
    """
    rows, rejects = [], []
    content, ends = bytearray(), [0]
    with _loading(sizes, kept) as (load, further):
        for number, (source, pair) in enumerate(read_unit(ranges, layouts, further), start=first_row):
            try:
                if isinstance(pair, PairRejectedError):
                    raise pair
                fields, arrays = load(pair)
                shape = {"shape": [len(arrays), *arrays[0].shape]}
                rows.append(pair_fields(pair, source) | fields | shape | {"row": number})
                for array in arrays:
                    content += array.tobytes()
                ends.append(len(content))
            except (PairRejectedError, ImageRejectedError) as reason:
                rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=STAGE, reason=str(reason)))
    table = pa.Table.from_pylist(rows, schema=UNIT_SCHEMA)
    # from_pylist would copy every byte twice more.
    index = table.schema.get_field_index("content")
    return table.set_column(index, "content", bytes_array(content, ends)), rejects


@contextmanager
def _loading(sizes: Sequence[Size], kept: KeptSource | None) -> Iterator[tuple[_Load, Sequence[str]]]:
    """Yield a function that loads a pair, and the further columns that it needs."""
    if kept is None:
        yield partial(_decode, sizes=sizes), ()
        return
    from smpo_pipeline.inversion.generated import COLUMNS, GeneratedPair  # noqa: PLC0415  (torch)
    from smpo_schemas.generation.kept_latents import KeptLatents  # noqa: PLC0415  (torch)

    def load(pair: Pair) -> tuple[dict[str, Any], Sequence[np.ndarray]]:
        found = GeneratedPair.find(pair, latents, states=kept.states)
        fields = {
            "size": [[kept.side, kept.side]] * 2,
            "crop": [[0, 0]] * 2,
            "noise": [dict(zip(("seed", "index", "dtype"), each, strict=True)) for each in found.noise],
            "timesteps": found.timesteps,
        }
        return fields, list(found.latents_K2Chw)

    with KeptLatents(kept.folders) as latents:
        yield load, COLUMNS


def _decode(pair: Pair, sizes: Sequence[Size]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return sizes and crops, and the pixels of both images at one size."""
    images = [Image.fromarray(worker_decoder().decode(data)) for data in (pair.image_0, pair.image_1)]
    resized, crops = resize_pair(images, sizes)
    fields = {
        "size": [[image.height, image.width] for image in images],
        "crop": [list(crop) for crop in crops],
    }
    return fields, resized


def unit_pairs(row: pa.Table) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield each pair's fields, and its content in its shape: pixels or latents, a view of the table's buffer."""
    fields = pa.table({name: cell_values(row, name) for name in UNIT_SCHEMA.names if name != "content"})
    for pair, content in zip(fields.to_pylist(), byte_views(cell_values(row, "content")), strict=True):
        yield pair, (content.view(np.float32) if pair["noise"] else content).reshape(pair.pop("shape"))
