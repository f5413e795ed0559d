"""Some pairs of a data set, prepared as the job does: to be measured with, and for the lengths of their texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.images.buckets import Size
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import worker_decoder
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.prepare_pair import prepare_pair
from smpo_schemas.pairs import (
    Pair,
    PairFile,
    PairRejectedError,
    RowRange,
    column_names,
    read_rows,
    resolve_columns,
    slice_files,
)

_PLACES = 8


@dataclass(frozen=True)
class SampledPairs:
    """Pairs from all over a data set.

    Attributes:
        pairs: those that can be used.
        rows: how many were looked at.
        total: rows of the data set.
        decode_seconds: time that reading, decoding and cropping took, a row, on one core.
    """

    pairs: list[PreparedPair]
    rows: int
    total: int
    decode_seconds: float


def sample_pairs(
    files: Sequence[PairFile],
    columns: dict[str, str | None],
    sizes: Sequence[Size],
    *,
    count: int,
    limit: int | None,
    rewards: Sequence[str],
) -> SampledPairs:
    """Read and decode up to ``count`` pairs from evenly spaced places.

    Args:
        files: of the data set.
        columns: chosen by flags.
        sizes: one of these is what a pair's images are brought to.
        count: rows to look at, at the most.
        limit: only the data set's first rows count, None: all.
        rewards: names of the scores that samples will carry; their values are made up.

    Raises:
        UserError: a file cannot be read, or none of the pairs can be used.
    """
    total = sum(file.rows for file in files)
    total = min(total, limit or total)
    with suppress(ImageRejectedError):
        worker_decoder().decode(b"")  # its start is none of the pairs' time
    begin = time.perf_counter()
    pairs: list[PreparedPair] = []
    rows = 0
    problem = ""
    for part in _parts(files, total, count, limit):
        names = resolve_columns(column_names(part.path), columns, part.path)
        for source, pair in read_rows(part, names):
            rows += 1
            try:
                if isinstance(pair, PairRejectedError):
                    raise pair
                pairs.append(_prepared(pair, sizes, rewards))
            except (PairRejectedError, ImageRejectedError) as reason:
                problem = problem or f"{source}: {reason}"
    if not pairs:
        raise UserError(f"none of {rows} pairs looked at can be used; the first: {problem}")
    return SampledPairs(pairs, rows, total, (time.perf_counter() - begin) / rows)


def _parts(files: Sequence[PairFile], total: int, count: int, limit: int | None) -> list[RowRange]:
    if total <= count:
        return [part for unit in slice_files(files, total, limit) for part in unit]
    places = slice_files(files, total // _PLACES, limit)[:_PLACES]
    room = count // _PLACES
    return [RowRange(unit[0].path, unit[0].start, min(unit[0].stop, unit[0].start + room)) for unit in places]


def _prepared(pair: Pair, sizes: Sequence[Size], rewards: Sequence[str]) -> PreparedPair:
    images = [Image.fromarray(worker_decoder().decode(data)) for data in (pair.image_0, pair.image_1)]
    # As many digits as a float32 has in JSON.
    score = float(np.float32(0.2123456))
    return prepare_pair(
        pair.prompt,
        images,
        sizes,
        pair_id=pair.pair_id,
        label=pair.label,
        annotator=pair.annotator,
        scores=dict.fromkeys(rewards, (score, score)),
    )
