"""Bucket sizes, and the choice of one for a pair."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from smpo_pipeline.images.buckets import bucket_sizes, choose_size, describe_buckets, list_buckets, resize_pair
from smpo_pipeline.images.decode import ImageRejectedError
from tests.pictures import picture

# Height: widths of arXiv 2307.01952, appendix I.
SDXL = {
    512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536), 704: (1472, 1408, 1344),
    768: (1344, 1280), 832: (1216, 1152), 896: (1152, 1088), 960: (1088, 1024), 1024: (1024, 960), 1088: (960, 896),
    1152: (896, 832), 1216: (832,), 1280: (768,), 1344: (768,), 1408: (704,), 1472: (704,), 1536: (640,), 1600: (640,),
    1664: (576,), 1728: (576,), 1792: (576,), 1856: (512,), 1920: (512,), 1984: (512,), 2048: (512,),
}  # fmt: skip


def test_sizes_at_1024_are_sdxls_except_smaller_ones_of_the_same_long_side():
    published = {(height, width) for height, widths in SDXL.items() for width in widths}
    assert len(published) == 40
    by_long: dict[tuple[int, bool], int] = {}
    for height, width in published:
        side = (max(height, width), height >= width)
        by_long[side] = max(by_long.get(side, 0), min(height, width))
    largest = {(long, short) if upright else (short, long) for (long, upright), short in by_long.items()}
    # (960, 1024) has the side of the square, and is not larger.
    assert set(bucket_sizes(1024, 32)) == largest - {(960, 1024)}


@pytest.mark.parametrize(("resolution", "multiple", "step"), [(512, 64, 64), (768, 64, 64), (32, 8, 8), (800, 32, 64)])
def test_other_resolutions(resolution, multiple, step):
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert list(sizes) == sorted(sizes, key=lambda size: size[1] / size[0])
    for height, width in set(sizes) - {(resolution, resolution)}:
        assert height % step == width % step == 0
        long, short = max(height, width), min(height, width)
        assert long * short <= resolution**2 < long * (short + step)
        assert resolution < long <= 2 * resolution


def test_the_size_nearest_to_both_images_is_chosen():
    sizes = bucket_sizes(1024, 32)
    for first, second, wanted in (
        ((1024, 1024), (64, 64), (1024, 1024)),
        ((1920, 1080), (1920, 1080), (768, 1344)),
        ((1080, 1920), (1080, 1920), (1344, 768)),
        ((1000, 1000), (2000, 1000), (832, 1216)),  # the root of 2 is 1.414: 1.462 is nearer than 1.286
        ((900, 100), (900, 100), (512, 2048)),
    ):
        images = [Image.new("RGB", first), Image.new("RGB", second)]
        assert choose_size(images, sizes) == choose_size(images[::-1], sizes) == wanted


def test_pairs_of_too_different_shapes_are_rejected_if_there_are_several_sizes():
    images = [Image.new("RGB", (100, 100)), Image.new("RGB", (201, 100))]
    with pytest.raises(ImageRejectedError, match="aspect ratios too different: 100 x 100 and 201 x 100 pixels"):
        choose_size(images, bucket_sizes(32, 8))
    assert choose_size(images, [(32, 32)]) == (32, 32)


@pytest.mark.parametrize(
    ("shapes", "size", "wholes", "corners"),
    [
        # By hand: one side fits; the other (26.7 and 28.4; 46.5 and 30; 33.07 and 35) is truncated to whole pixels.
        # Half of the rest is cropped at the top or left, with 0.5 rounded to 0 and 1.5 to 2.
        (((60, 40), (90, 64)), (24, 40), ((40, 26), (40, 28)), ((1, 0), (2, 0))),
        (((33, 64), (48, 64)), (40, 24), ((24, 46), (30, 40)), ((3, 0), (0, 3))),
        (((30, 31), (32, 35)), (32, 32), ((32, 33), (32, 35)), ((0, 0), (2, 0))),
    ],
)
def test_images_cover_their_size_and_lose_the_rest_evenly(shapes, size, wholes, corners):
    images = [picture(width, height, seed) for seed, (width, height) in enumerate(shapes)]
    sizes = bucket_sizes(32, 8)
    assert choose_size(images, sizes) == size
    height, width = size
    pixels, crops = resize_pair(images, sizes)
    assert tuple(crops) == corners
    for image, whole, actual, (top, left) in zip(images, wholes, pixels, crops, strict=True):
        wanted = np.asarray(image.resize(whole, Image.Resampling.BILINEAR))[top : top + height, left : left + width]
        np.testing.assert_array_equal(actual, wanted)


def test_buckets_are_listed_and_described():
    buckets = list_buckets({(24, 40): 1, (40, 24): 2, (32, 32): 5})
    counts = [(bucket.height, bucket.width, bucket.pairs) for bucket in buckets]
    assert counts == [(40, 24, 2), (32, 32, 5), (24, 40, 1)]
    assert describe_buckets(buckets) == "40 x 24 (25%), 32 x 32 (62%), 24 x 40 (12%)"
