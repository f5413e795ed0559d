"""Metadata, parts and scans of files: what is read of them, and how many are too many."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from smpo_pipeline.images import decode as images
from smpo_pipeline.images.decode import ImageRejectedError, decode_image
from tests.pictures import encode, picture


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Build a grey PNG with these chunks after its header, and zeros as pixels."""
    rows = zlib.compress(bytes((width + 1) * height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    encoded = (
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoded)


def test_metadata_of_a_png_is_not_unpacked(monkeypatch):
    """Neither compression bombs nor ordinary metadata."""
    ballast = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
    chunks = [
        (b"zTXt", b"workflow\0\0" + ballast),
        (b"iTXt", b"key\0\1\0en\0key\0" + ballast),
        (b"iCCP", b"profile\0\0" + ballast),
        (b"tEXt", b"key\0" + bytes(PngImagePlugin.MAX_TEXT_MEMORY + 1)),
    ]
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", lambda _: pytest.fail("text was unpacked"))
    for chunk in chunks:
        assert decode_image(png(40, 40, chunk)).size == (40, 40)
    assert decode_image(png(40, 30, *chunks) + b"\xff\xda" * 1000).size == (40, 30)


def test_a_png_is_rotated_by_the_exif_in_its_texts():
    """ImageMagick and Adobe's programs store a JPEG's EXIF so."""
    exif = b"exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + bytes(4)
    exif = exif.replace(b"exif", b"Exif")
    raw = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    notes = [
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        (b"eXIf", exif[6:]),
    ]
    for note in notes:
        assert decode_image(png(40, 30, note)).size == (30, 40), note


def test_exif_in_a_text_too_large_for_pillow_is_ignored():
    """Pillow refuses the whole image for a text that unpacks to more than a megabyte."""
    long = zlib.compress(b"\nexif\n" + bytes(2 * PngImagePlugin.MAX_TEXT_CHUNK))
    for note in (
        (b"zTXt", b"Raw profile type exif\0\0" + long),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + long),
    ):
        assert decode_image(png(40, 30, note)).size == (40, 30), note


def test_the_transparent_grey_of_sixteen_bits_is_white():
    values = np.full((30, 40), 30000, np.uint16)
    values[:15] = 0
    encoded = encode(Image.fromarray(values), "PNG")
    clear = b"tRNS" + struct.pack(">H", 30000)
    chunk = struct.pack(">I", 2) + clear + struct.pack(">I", zlib.crc32(clear))
    at = encoded.index(b"IDAT") - 4
    decoded = np.asarray(decode_image(encoded[:at] + chunk + encoded[at:]))[..., 0]
    assert (decoded[:15] == 0).all()
    assert (decoded[15:] == 255).all()


def test_pixels_are_counted_before_any_is_decoded():
    for width, height in ((10_001, 10_000), (2**31 - 1, 2**31 - 1), (65_535, 65_535)):
        data = bytearray(png(40, 40))
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        with pytest.raises(ImageRejectedError, match="too large|DecompressionBomb"):
            decode_image(bytes(data))


def test_files_with_too_many_parts_are_rejected_before_pillow_reads_them(monkeypatch):
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


def test_the_limit_of_scans_depends_on_the_image_size(monkeypatch):
    data = encode(picture(), progressive=True)
    assert data.count(b"\xff\xda") == 10
    scan, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    monkeypatch.setattr(images, "MAX_SCANNED", 10 * 40 * 30)
    assert decode_image(data).size == (40, 30)
    with pytest.raises(ImageRejectedError, match="too slow: 11 scans of 40 x 30"):
        decode_image(data[:end] + data[scan:end] + data[end:])


def test_scans_after_the_end_of_the_image_are_not_counted(monkeypatch):
    """A phone's photograph may have a film after it, and a thumbnail before its pixels."""
    monkeypatch.setattr(images, "MAX_SCANNED", 10 * 40 * 30)
    thumbnail = b"thumb" + b"\xff\xda\0\2" * 50
    data = encode(picture(), progressive=True)
    data = data[:2] + b"\xff\xef" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
    assert decode_image(data + b"film" + b"\xff\xda" * 50).size == (40, 30)
    mpo = encode(picture(), "MPO", save_all=True, append_images=[picture(seed=seed) for seed in range(20)])
    assert decode_image(mpo).size == (40, 30)


@pytest.mark.parametrize("before", [b"", b"\xff\x02\xff\xff", b"\xff\xd0", b"\xff\x01\xff\xff", b"\xff" * 1000])
def test_no_scan_hides_behind_a_marker(monkeypatch, before):
    data = encode(picture(), progressive=True)
    scan, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    monkeypatch.setattr(images, "MAX_SCANNED", 10 * 40 * 30)
    with pytest.raises(ImageRejectedError, match="too slow: 11 scans of 40 x 30"):
        decode_image(data[:end] + before + data[scan:end] + data[end:])


def test_markers_between_scans_are_counted():
    data = encode(picture(), progressive=True)
    end = data.rfind(b"\xff\xd9")
    with pytest.raises(ImageRejectedError, match="too slow: a JPEG of more than"):
        decode_image(data[:end] + b"\xff\xfe\0\2" * 100_000 + data[end:])


def test_scans_of_a_tiff_are_counted_by_strip(monkeypatch):
    data = encode(picture(400, 300), "TIFF", compression="jpeg", tiffinfo={278: 8})
    monkeypatch.setattr(images, "MAX_SCANNED", 400 * 304)
    assert data.count(b"\xff\xda") == 38
    assert decode_image(data + b"\xff\xda" * 1000).size == (400, 300)
    monkeypatch.setattr(images, "MAX_SCANNED", 400 * 300 - 1)
    with pytest.raises(ImageRejectedError, match="too slow"):
        decode_image(data)
