from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
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


GREY = np.asarray(picture().convert("L"))
UNSIGNED, SIGNED, FLOAT = 1, 2, 3


def tiff(values: bytes, bits: int, kind: int, *, white_is_zero: bool = False) -> bytes:
    """Build a grey TIFF of 40 x 30 samples; Pillow writes only a few kinds."""
    entries = {256: 40, 257: 30, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: 30}
    entries |= {279: len(values), 339: kind}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    directory = struct.pack("<H", len(entries)) + fields + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(values)) + values + directory


def twelve_bits(values: np.ndarray) -> bytes:
    """Pack two samples of 12 bits into three bytes."""
    first, second = values.reshape(-1, 2).T.astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("bits", "kind", "white", "packed"),
    [
        (8, UNSIGNED, 255, "u1"),
        (12, UNSIGNED, 4095, None),
        (16, UNSIGNED, 65535, "<u2"),
        (16, SIGNED, 255, "<i2"),
        (16, SIGNED, 32767, "<i2"),
        (32, UNSIGNED, 65535, "<u4"),
        (32, SIGNED, 255, "<i4"),
        (32, FLOAT, 1, "<f4"),
        (32, FLOAT, 255, "<f4"),
    ],
)
def test_grey_of_any_depth_is_scaled_to_its_white(bits, kind, white, packed):
    values = GREY / 255 * white
    samples = np.rint(values) if kind != FLOAT else values
    packed_samples = samples.astype(packed).tobytes() if packed else twelve_bits(samples)
    np.testing.assert_array_equal(np.asarray(decode_image(tiff(packed_samples, bits, kind)))[..., 0], GREY)


@pytest.mark.parametrize(("bits", "kind", "packed"), [(8, UNSIGNED, "u1"), (16, UNSIGNED, "<u2"), (32, FLOAT, "<f4")])
def test_white_is_zero_is_inverted(bits, kind, packed):
    white = 1 if kind == FLOAT else 2**bits - 1
    samples = (white - GREY / 255 * white).astype(packed)
    decoded = np.asarray(decode_image(tiff(samples.tobytes(), bits, kind, white_is_zero=True)))
    assert np.abs(decoded[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(
    ("packed", "values"),
    [
        ("<f4", [-0.1, 1]),
        ("<f4", [0, 1.1]),
        ("<f4", [0, 300]),
        ("<f4", [0, np.nan]),
        ("<f4", [0, np.inf]),
        ("<i4", [-1, 200]),
        ("<i4", [0, 1023]),
        ("<u4", [0, 2**32 - 1]),
    ],
)
def test_grey_with_an_unknown_white_is_rejected_not_clipped(packed, values):
    samples = np.resize(np.array(values, packed), 1200)
    with pytest.raises(ImageRejectedError, match="unknown white: "):
        decode_image(tiff(samples.tobytes(), 32, FLOAT if packed == "<f4" else SIGNED))


MODES = {
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "BMP": ("1", "L", "P", "RGB"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_keeps_its_range(kind, mode):
    """Grey steps from black to white, half transparent in modes with transparency."""
    steps = np.repeat([0, 255] if mode == "1" else [0, 64, 128, 192, 255], 8).astype(np.uint8)
    grey = Image.fromarray(np.tile(steps, (40, 1)))
    image = grey.convert("RGB")
    alpha = mode in ("LA", "PA", "RGBA")
    if mode == "LAB":
        image = ImageCms.profileToProfile(image, SRGB, ImageCms.createProfile("LAB"), outputMode="LAB")
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey.quantize(8).convert(mode) if mode in ("P", "PA") else image.convert(mode)
    if alpha:
        image.putalpha(128)
    data = encode(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
    expected = 127 + steps[:, None] / 2 if alpha else steps[:, None]
    assert np.abs(np.asarray(decode_image(data)).astype(float) - expected).max() <= 3


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
