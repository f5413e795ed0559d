"""Read the input rows of a unit, for all jobs whose input is pairs.

Nothing here imports torch: decoding workers start fast and stay small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from smpo_common.store_path import AnyPath
from smpo_schemas.pairs import FURTHER, Layout, Pair, PairRejectedError, RowRange, image_id, read_rows
from smpo_schemas.scoring.scores import IMAGE_IDS

Layouts = Mapping[AnyPath, Layout]
"""The layout of each input file."""

PAIR_FIELDS = (
    ("pair_id", pa.string()),
    ("prompt", pa.string()),
    ("label", pa.float32()),
    ("votes", pa.int32()),
    ("annotator", pa.string()),
    *((name, pa.string()) for name in IMAGE_IDS),
    *FURTHER.items(),
    ("source", pa.string()),
)
"""Fields of a row, besides its pixels, that the jobs carry; ``source`` is ``path:row``."""


def pair_fields(pair: Pair, source: str) -> dict[str, Any]:
    """Return the values of :data:`PAIR_FIELDS`."""
    return {
        "pair_id": pair.pair_id,
        "prompt": pair.prompt,
        "label": pair.label,
        "votes": pair.votes,
        "annotator": pair.annotator,
        **{name: pair.further.get(name) for name in FURTHER},
        **dict(zip(IMAGE_IDS, map(image_id, (pair.image_0, pair.image_1)), strict=True)),
        "source": source,
    }


def read_unit(
    ranges: Sequence[RowRange], layouts: Layouts, further: Sequence[str] = ()
) -> Iterator[tuple[str, Pair | PairRejectedError]]:
    """Yield ``(source, pair or the reason for its rejection)`` for each row of a unit, in order.

    ``further`` names columns for :attr:`Pair.further`.
    """
    for rows in ranges:
        yield from read_rows(rows, layouts[rows.path], further)


def unit_sizes(units: Sequence[Sequence[RowRange]]) -> list[int]:
    """Return the number of input rows of each unit."""
    return [sum(rows.stop - rows.start for rows in ranges) for ranges in units]


def describe_reading(ranges: Sequence[RowRange]) -> str:
    """Describe the reading of a unit, for the error if workers die of it."""
    parts = ", ".join(f"rows {rows.start} to {rows.stop} of {rows.path}" for rows in ranges)
    return f"reading {parts}; is the file damaged, or the workers' memory too small?"
