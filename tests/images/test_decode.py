from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from smpo_pipeline.images import decode as images
from smpo_pipeline.images.decode import ImageRejectedError, decode_image, resize_and_crop
from tests.pictures import all_kinds, encode, picture, rotated, sixteen_bit_grey

SRGB = ImageCms.createProfile("sRGB")


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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_composition_in_bands_equals_composition_of_the_whole(mode):
    image = picture(30, 700).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    options = {"transparency": 7} if mode == "P" else {"transparency": (255, 255, 255)} if mode == "RGB" else {}
    data = encode(image.convert(mode), "PNG", **options)
    with Image.open(io.BytesIO(data)) as opened:
        whole = opened.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(expected))


def test_lack_of_memory_does_not_reject_the_file(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        decode_image(encode(picture()))


def test_an_unreadable_file_has_a_reason(monkeypatch):
    whole = encode(picture(200, 200))
    for data in (whole[: len(whole) // 2], b"nonsense", b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50):
        with pytest.raises(ImageRejectedError, match="image not readable"):
            decode_image(data)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageRejectedError, match="image too large: 200 x 200"):
        decode_image(whole)


@pytest.mark.parametrize("side", [32, 37])
def test_crops_equal_the_published_preprocessing(side):
    """Pixel for pixel those of torchvision on PIL images, at the same position."""
    resize, crop = Resize(side, InterpolationMode.BILINEAR), CenterCrop(side)
    sizes = np.random.default_rng(side).integers(1, 160, (300, 2)).tolist()
    for width, height in [*sizes, (64, 64), (side, side + 1), (side + 3, side), (1, 1), (33, 1000), (1024, 683)]:
        image = picture(width, height)
        resized = resize(image)
        number = np.arange(resized.height * resized.width, dtype=np.int32).reshape(resized.height, resized.width)
        cropped, corner = resize_and_crop(image, (side, side))
        assert cropped.dtype == np.uint8
        np.testing.assert_array_equal(cropped, np.asarray(crop(resized)), err_msg=f"{width} x {height}")
        assert corner == divmod(crop(Image.fromarray(number)).getpixel((0, 0)), resized.width)


def test_a_photo_at_512():
    """1024 x 683 pixels become 767.57 x 512: torchvision truncates to 767, and rounds the corner 127.5 to 128."""
    image = picture(1024, 683)
    cropped, corner = resize_and_crop(image, (512, 512))
    assert corner == (0, 128)
    whole = np.asarray(image.resize((767, 512), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(cropped, whole[:, 128 : 128 + 512])


def test_a_line_of_pixels_is_rejected():
    with pytest.raises(ImageRejectedError, match="too thin: 1 x 101"):
        decode_image(encode(picture(1, 101), "PNG"))


def test_a_postscript_file_does_not_start_ghostscript(monkeypatch):
    """Pillow would start it to draw the file; found by ``python -m tests.fuzz``."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    for kind in ("EPS", "PPM", "TGA", "ICO", "PDF"):
        with pytest.raises(ImageRejectedError, match="image not readable: .*JPEG, PNG, WEBP, GIF, TIFF, BMP"):
            decode_image(encode(picture(), kind))


@pytest.mark.filterwarnings("error")
def test_odd_tags_do_not_fill_the_log(recwarn):
    entries = b"".join(struct.pack("<HHII", tag, 1, 60_000, 8) for tag in range(1000, 1100))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 100) + entries
    jpeg = encode(picture())
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    assert decode_image(data).size == (40, 30)
    assert not recwarn.list


def test_a_reason_is_one_printable_line():
    reason = str(ImageRejectedError("a\x1b[2J\nb" + "x" * 10_000))
    assert reason.isprintable()
    assert len(reason) < 2000
