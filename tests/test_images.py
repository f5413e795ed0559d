from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from smpo_pipeline import images
from smpo_pipeline.images import ImageRejectedError, decode_image, resize_and_crop
from tests.pictures import all_kinds, encode, picture, rotated, sixteen_bit_grey


@pytest.mark.parametrize("kind", list(all_kinds()))
def test_every_kind_becomes_upright_rgb(kind):
    image = decode_image(all_kinds()[kind])
    assert image.mode == "RGB"
    assert image.width > 0


def test_exif_rotation_is_applied():
    image = decode_image(rotated())
    assert image.size == (30, 40)
    upright = picture().transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 6


def test_sixteen_bits_are_scaled_not_clipped():
    data, values = sixteen_bit_grey()
    np.testing.assert_array_equal(np.asarray(decode_image(data))[..., 0], np.rint(values / 257).astype(np.uint8))


def test_transparency_is_composed_over_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    decoded = decode_image(encode(image, "PNG"))
    assert decoded.getpixel((0, 0)) == (200, 0, 0)
    assert decoded.getpixel((1, 0)) == (255, 255, 255)


def test_what_cannot_be_read_has_a_reason(monkeypatch):
    whole = encode(picture(200, 200))
    for data in (whole[: len(whole) // 2], b"nonsense", b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50):
        with pytest.raises(ImageRejectedError, match="image not readable"):
            decode_image(data)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageRejectedError, match="image too large: 200 x 200"):
        decode_image(whole)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 60), (60, 100), (33, 1000), (1, 1), (31, 32)])
def test_shorter_side_to_the_resolution_then_centre_crop(width, height):
    image = picture(width, height)
    crop, (top, left) = resize_and_crop(image, 32)
    assert crop.shape == (32, 32, 3)
    assert crop.dtype == np.uint8
    scale = 32 / min(width, height)
    resized = image.resize((max(32, round(width * scale)), max(32, round(height * scale))), Image.Resampling.BILINEAR)
    assert (top, left) == ((resized.height - 32) // 2, (resized.width - 32) // 2)
    np.testing.assert_array_equal(crop, np.asarray(resized)[top : top + 32, left : left + 32])


def test_a_line_of_pixels_is_rejected():
    with pytest.raises(ImageRejectedError, match="too thin: 1 x 101"):
        decode_image(encode(picture(1, 101), "PNG"))
