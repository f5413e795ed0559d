"""Aspect-ratio buckets (``--buckets``): image sizes of about the same area, so that little is cropped away.

The sizes are those of SDXL (arXiv 2307.01952, appendix I), scaled from its resolution of 1024. Sides are multiples of a
sixteenth of the resolution. The long side is at most twice the resolution. The short side is the largest for which the
image has no more pixels than the square: a batch that fits in memory at the square fits at every size. (Of SDXL's 40
sizes at 1024, seven are left out: each has the same long side as a larger one.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from smpo_pipeline.images.decode import ImageRejectedError, resize_and_crop
from smpo_schemas.manifest import Bucket
from smpo_schemas.reject_kinds import RejectKind

Size = tuple[int, int]
"""Height and width in pixels."""

STEPS_A_SIDE = 16
"""A bucket's sides are multiples of resolution / STEPS_A_SIDE, rounded up to a multiple that the model accepts."""

MAX_STRETCH = 2.0
"""Largest side divided by the resolution. Also the largest quotient of the aspect ratios of two images of a pair: their
bucket then lies halfway between them, and about 71 % of each image is kept."""


def bucket_sizes(resolution: int, multiple: int) -> tuple[Size, ...]:
    """List the bucket sizes by rising aspect ratio (width / height); the square is one of them.

    Args:
        resolution: side of the square in pixels.
        multiple: the model needs sides that are a multiple of it.
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
    """Choose one size for all images of a pair: nearest to their geometric mean aspect ratio, in logarithms.

    Raises:
        ImageRejectedError: there are several sizes, and the images' aspect ratios are too different to share one.
    """
    if len(sizes) == 1:
        return sizes[0]
    aspects = [image.width / image.height for image in images]
    if max(aspects) > MAX_STRETCH * min(aspects):
        shapes = " and ".join(f"{image.width} x {image.height}" for image in images)
        raise ImageRejectedError(f"{RejectKind.ASPECT_RATIOS}: {shapes} pixels do not share a bucket")
    mean = sum(map(math.log, aspects)) / len(aspects)
    return min(sizes, key=lambda size: abs(math.log(_aspect(size)) - mean))


def resize_pair(images: Sequence[Image.Image], sizes: Sequence[Size]) -> tuple[list[np.ndarray], list[Size]]:
    """Resize and crop both images of a pair to one of ``sizes``.

    Returns:
        The pixels of each image, uint8 [H, W, 3], and the (top, left) of each crop in the resized image.

    Raises:
        ImageRejectedError: the images cannot share a size.
    """
    size = choose_size(images, sizes)
    pixels, crops = zip(*(resize_and_crop(image, size) for image in images), strict=True)
    return list(pixels), list(crops)


def list_buckets(pairs: Mapping[Size, int]) -> list[Bucket]:
    """List counts of pairs as the manifest does, by rising aspect ratio."""
    return [Bucket(height=size[0], width=size[1], pairs=pairs[size]) for size in sorted(pairs, key=_aspect)]


def describe_buckets(buckets: Sequence[Bucket]) -> str:
    """Format the sizes with their share of the pairs."""
    total = sum(bucket.pairs for bucket in buckets)
    return ", ".join(f"{bucket.height} x {bucket.width} ({bucket.pairs / total:.0%})" for bucket in buckets)
