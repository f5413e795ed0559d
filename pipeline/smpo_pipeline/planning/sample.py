"""Sample pairs of a data set, to measure the inversion with them and their prompts' lengths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.images.buckets import Size
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import worker_decoder
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.generated import COLUMNS, GeneratedPair, KeptSource, blank_pixels
from smpo_pipeline.inversion.prepare_pair import prepare_pair
from smpo_schemas.generation.kept_latents import KeptLatents
from smpo_schemas.pairs import (
    Pair,
    PairFile,
    PairRejectedError,
    RowRange,
    layouts_of,
    read_rows,
    slice_files,
)

_PLACES = 8


@dataclass(frozen=True)
class SampledPairs:
    """Pairs from evenly spaced places of a data set.

    Attributes:
        pairs: the usable ones.
        rows: number of rows read.
        total: rows of the data set.
        decode_seconds: mean time for reading, decoding and cropping a row on one core.
    """

    pairs: list[PreparedPair]
    rows: int
    total: int
    decode_seconds: float


def sample_pairs(
    files: Sequence[PairFile],
    sizes: Sequence[Size],
    *,
    count: int,
    limit: int | None,
    rewards: Sequence[str],
    kept: KeptSource | None = None,
) -> SampledPairs:
    """Read and decode up to ``count`` pairs from evenly spaced places, as `invert` does.

    Args:
        files: of the data set.
        sizes: image sizes to choose from, one for both images of a pair.
        count: most rows to read.
        limit: use only the first rows of the data set; None: all.
        rewards: names of the scores of each pair; their values are made up.
        kept: where latents are that take the place of images; None: images are decoded.

    Raises:
        UserError: a file cannot be read, or no pair is usable.
    """
    total = sum(file.rows for file in files)
    total = min(total, limit or total)
    with suppress(ImageRejectedError):
        worker_decoder().decode(b"")  # starts the child process before the clock
    begin = time.perf_counter()
    layouts = layouts_of(files)
    pairs: list[PreparedPair] = []
    rows = 0
    problem = ""
    with KeptLatents(kept.folders if kept else ()) as latents:
        for part in _parts(files, total, count, limit):
            for source, pair in read_rows(part, layouts[part.path], COLUMNS if kept else ()):
                rows += 1
                try:
                    if isinstance(pair, PairRejectedError):
                        raise pair
                    pairs.append(_prepared(pair, sizes, rewards, kept, latents))
                except (PairRejectedError, ImageRejectedError) as reason:
                    problem = problem or f"{source}: {reason}"
    if not pairs:
        raise UserError(f"none of the {rows} sampled pairs is usable; the first: {problem}")
    return SampledPairs(pairs, rows, total, (time.perf_counter() - begin) / rows)


def _parts(files: Sequence[PairFile], total: int, count: int, limit: int | None) -> list[RowRange]:
    if total <= count:
        return [part for unit in slice_files(files, total, limit) for part in unit]
    places = slice_files(files, total // _PLACES, limit)[:_PLACES]
    room = count // _PLACES
    return [RowRange(unit[0].path, unit[0].start, min(unit[0].stop, unit[0].start + room)) for unit in places]


def _prepared(
    pair: Pair, sizes: Sequence[Size], rewards: Sequence[str], kept: KeptSource | None, latents: KeptLatents
) -> PreparedPair:
    # As many digits in JSON as a float32 has.
    score = float(np.float32(0.2123456))
    known: dict[str, Any] = {
        "prompt": pair.prompt,
        "pair_id": pair.pair_id,
        "label": pair.label,
        "votes": pair.votes,
        "annotator": pair.annotator,
        "scores": dict.fromkeys(rewards, (score, score)),
    }
    if kept:
        return PreparedPair(
            **known,
            pixels_2HW3=blank_pixels(kept.side),
            size=((kept.side, kept.side),) * 2,
            crop=((0, 0),) * 2,
            measured=False,
            generated=GeneratedPair.find(pair, latents, states=kept.states),
        )
    images = [Image.fromarray(worker_decoder().decode(data)) for data in (pair.image_0, pair.image_1)]
    return prepare_pair(images=images, sizes=sizes, **known)
