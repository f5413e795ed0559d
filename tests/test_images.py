from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_composition_by_rows_equals_that_of_the_whole(mode):
    image = picture(30, 700).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    options = {"transparency": 7} if mode == "P" else {"transparency": (255, 255, 255)} if mode == "RGB" else {}
    data = encode(image.convert(mode), "PNG", **options)
    with Image.open(io.BytesIO(data)) as opened:
        whole = opened.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(expected))


def test_a_machine_without_memory_is_no_fault_of_the_file(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        decode_image(encode(picture()))


def test_what_cannot_be_read_has_a_reason(monkeypatch):
    whole = encode(picture(200, 200))
    for data in (whole[: len(whole) // 2], b"nonsense", b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 50):
        with pytest.raises(ImageRejectedError, match="image not readable"):
            decode_image(data)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageRejectedError, match="image too large: 200 x 200"):
        decode_image(whole)


@pytest.mark.parametrize("side", [32, 37])
def test_crops_are_those_of_the_published_preprocessing(side):
    """Torchvision's, on PIL images: pixel for pixel, at the place where it crops."""
    resize, crop = Resize(side, InterpolationMode.BILINEAR), CenterCrop(side)
    sizes = np.random.default_rng(side).integers(1, 160, (300, 2)).tolist()
    for width, height in [*sizes, (64, 64), (side, side + 1), (side + 3, side), (1, 1), (33, 1000), (1024, 683)]:
        image = picture(width, height)
        resized = resize(image)
        number = np.arange(resized.height * resized.width, dtype=np.int32).reshape(resized.height, resized.width)
        found, corner = resize_and_crop(image, (side, side))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.asarray(crop(resized)), err_msg=f"{width} x {height}")
        assert corner == divmod(crop(Image.fromarray(number)).getpixel((0, 0)), resized.width)


def test_a_photo_at_512():
    """1024 x 683 pixels become 767.57 x 512: torchvision says 767, whose crop begins at 127.5, so at 128."""
    image = picture(1024, 683)
    found, corner = resize_and_crop(image, (512, 512))
    assert corner == (0, 128)
    whole = np.asarray(image.resize((767, 512), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(found, whole[:, 128 : 128 + 512])


def test_a_line_of_pixels_is_rejected():
    with pytest.raises(ImageRejectedError, match="too thin: 1 x 101"):
        decode_image(encode(picture(1, 101), "PNG"))


def test_a_postscript_file_does_not_start_ghostscript(monkeypatch):
    """Pillow would, to draw it: a finding of ``python -m tests.fuzz``."""
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    for kind in ("EPS", "PPM", "TGA", "ICO", "PDF"):
        with pytest.raises(ImageRejectedError, match="none of JPEG, PNG, WEBP, GIF, TIFF, BMP"):
            decode_image(encode(picture(), kind))


def test_thirty_two_bits_of_grey_are_read_as_sixteen():
    values = np.array([[-5, 0, 257, 65535, 70_000]], dtype=np.int32)
    decoded = decode_image(encode(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(np.asarray(decoded)[0, :, 0], [0, 0, 1, 255, 255])


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG with these chunks after its header, and pixels that are zero."""
    rows = zlib.compress(bytes((width + 1) * height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    encoded = (
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoded)


def test_text_and_profiles_that_unpack_to_gigabytes_are_rejected():
    bomb = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    for chunk in ((b"zTXt", b"key\0\0" + bomb), (b"iTXt", b"key\0\1\0en\0key\0" + bomb)):
        with pytest.raises(ImageRejectedError, match="image not readable"):
            decode_image(png(40, 40, chunk))
    assert decode_image(png(40, 40)).size == (40, 40)


def test_pixels_are_counted_before_any_is_decoded():
    for width, height in ((10_001, 10_000), (2**31 - 1, 2**31 - 1), (65_535, 65_535)):
        data = bytearray(png(40, 40))
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        with pytest.raises(ImageRejectedError, match="too large|DecompressionBomb"):
            decode_image(bytes(data))


def test_files_of_too_many_parts_are_rejected_before_pillow_reads_them(monkeypatch):
    """A megabyte of empty chunks or segments takes a second of Pillow's time."""
    jpeg = encode(picture())
    many = [
        (png(40, 40, *[(b"prVt", b"")] * images.MAX_CHUNKS), "chunks"),
        (jpeg[:2] + b"\xff\xef\0\2" * 500 + jpeg[2:], "500 segments"),
        (jpeg[:2] + b"\xff\xd0" * 2_000_000 + jpeg[2:], "500 segments"),
        (jpeg[:2] + b"\xff\xd0\xff\xd0" * 1_000_000 + jpeg[2:], "500 segments"),
        (jpeg[:2] + b"\xff" * 2_000_000 + jpeg[2:], "bytes between"),
        (jpeg[:2] + b"junk" * 500_000 + jpeg[2:], "bytes between"),
        (jpeg[:2] + b"j" * 2_000_000, "bytes between"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
        for data, reason in many:
            with pytest.raises(ImageRejectedError, match=f"too slow.*{reason}"):
                decode_image(data)
    profile = jpeg[:2] + b"\xff\xe2\xff\xff".ljust(65_537, b"\0") * 255 + b"\xff" * 1000 + jpeg[2:]
    assert decode_image(profile).size == (40, 30)


def test_scans_count_by_the_pixels_that_each_goes_over(monkeypatch):
    data = encode(picture(), progressive=True)
    assert data.count(b"\xff\xda") == 10
    scan, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    monkeypatch.setattr(images, "MAX_SCANNED", 10 * 40 * 30)
    assert decode_image(data).size == (40, 30)
    with pytest.raises(ImageRejectedError, match="too slow: 11 scans of 40 x 30"):
        decode_image(data[:end] + data[scan:end] + data[end:])


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
