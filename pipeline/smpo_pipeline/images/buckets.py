"""Aspect-ratio buckets (``--buckets``): image sizes of about one area, so that little is cropped away.

The sizes are those of SDXL (arXiv 2307.01952, appendix I), scaled from its resolution of 1024: sides are multiples of a
sixteenth of the resolution, the long one is at most twice the resolution, and the short one is the largest for which
there are no more pixels than in the square, so that a batch that fits in memory at the square fits at all of them. (Of
SDXL's 40 sizes at 1024 seven are left out: each is a smaller one beside another of the same long side.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from smpo_pipeline.images.decode import ImageRejectedError, resize_and_crop
from smpo_schemas.manifest import Bucket

Size = tuple[int, int]
"""Height and width in pixels."""

STEPS_A_SIDE = 16
"""A bucket's sides are multiples of the resolution over this, rounded up to what the model needs."""

MAX_STRETCH = 2.0
"""Largest side over the resolution; and the largest quotient of two images' aspect ratios that share a bucket, which
then lies about halfway between them: of each image about 71 % is kept."""


def bucket_sizes(resolution: int, multiple: int) -> tuple[Size, ...]:
    """The sizes that images may be brought to, by rising aspect ratio; the square is one of them.

    Args:
        resolution: side of the square.
        multiple: of what the model's image sides must be a multiple.
    """
    step = multiple * math.ceil(resolution / STEPS_A_SIDE / multiple)
    first = step * (resolution // step + 1)
    sizes = {(resolution, resolution)}
    for long in range(first, int(MAX_STRETCH * resolution) + 1, step):
        short = resolution**2 // long // step * step
        if short:
            sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes, key=_aspect))


def _aspect(size: Size) -> float:
    return size[1] / size[0]


def choose_size(images: Sequence[Image.Image], sizes: Sequence[Size]) -> Size:
    """The size for all images of a pair: of the nearest aspect ratio to their (geometric) mean, in logarithms.

    Raises:
        ImageRejectedError: there is a choice, and the images' aspect ratios are too far apart to share one.
    """
    if len(sizes) == 1:
        return sizes[0]
    aspects = [image.width / image.height for image in images]
    if max(aspects) > MAX_STRETCH * min(aspects):
        shapes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise ImageRejectedError(f"images of too different shapes for one bucket: {shapes} pixels")
    mean = sum(map(math.log, aspects)) / len(aspects)
    return min(sizes, key=lambda size: abs(math.log(_aspect(size)) - mean))


def resize_pair(images: Sequence[Image.Image], sizes: Sequence[Size]) -> tuple[list[np.ndarray], list[Size]]:
    """Bring both images of a pair to one of ``sizes``.

    Returns:
        Of each image its pixels, uint8 [H, W, 3], and its crop's (top, left) in the resized image.

    Raises:
        ImageRejectedError: they cannot share one.
    """
    size = choose_size(images, sizes)
    pixels, crops = zip(*(resize_and_crop(image, size) for image in images), strict=True)
    return list(pixels), list(crops)


def list_buckets(pairs: Mapping[Size, int]) -> list[Bucket]:
    """Counts of pairs as a manifest lists them: by rising aspect ratio."""
    return [Bucket(height=size[0], width=size[1], pairs=pairs[size]) for size in sorted(pairs, key=_aspect)]


def buckets_in_words(buckets: Sequence[Bucket]) -> str:
    """Sizes with their share of the pairs."""
    total = sum(bucket.pairs for bucket in buckets)
    return ", ".join(f"{each.height} x {each.width} ({each.pairs / total:.0%})" for each in buckets)
