"""Hostile image files."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from smpo_pipeline.images.decode import MAX_ASPECT, MAX_PIXELS, ImageRejectedError, decode_image
from tests.fuzzing.mutate import damage
from tests.pictures import all_kinds, encode, picture

_PNG = b"\x89PNG\r\n\x1a\n"
_SIDES = (0, 1, 2, 17, 1000, 9999, 10_001, 16_383, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)


def prepare(seed: int, folder: Path) -> Callable[[], str]:
    """Make the image of a seed; what is returned decodes it and says what became of it."""
    draw = random.Random(seed)
    kinds = corpus()
    name = draw.choice(list(kinds))
    data = kinds[name]
    special = [each for start, each in _SPECIAL if data.startswith(start)]
    if special and draw.random() < 0.5:
        data = special[0](data, draw)
    if draw.random() < 0.7:
        data = damage(data, draw, list(kinds.values()))

    def run() -> str:
        try:
            image = decode_image(data)
        except ImageRejectedError as reason:
            return _reason(str(reason))
        assert image.mode == "RGB"
        assert 0 < image.width * image.height <= MAX_PIXELS
        assert max(image.size) <= MAX_ASPECT * min(image.size)
        assert np.asarray(image).shape == (image.height, image.width, 3)
        return "read"

    return run


def _reason(reason: str) -> str:
    """The first words of a reason, which must be fit for a table and a terminal."""
    assert "MemoryError" not in reason
    assert reason.isprintable(), reason
    assert len(reason) < 2000
    return "rejected"


@cache
def corpus() -> dict[str, bytes]:
    """Whole images of many formats and modes."""
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    frames = [picture(seed=seed) for seed in range(4)]
    animation = {"save_all": True, "append_images": frames[1:], "duration": 50}
    floats = Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40))
    made = {
        "progressive": encode(picture(), progressive=True, quality=90),
        "restarts": encode(picture(), restart_marker_rows=1),
        "profile": encode(picture(), icc_profile=bytes(3000)),
        "comment": encode(picture(), comment=b"c" * 1000),
        "grey alpha": encode(rgba.convert("LA"), "PNG"),
        "text": encode(picture(), "PNG", pnginfo=_text()),
        "apng": encode(frames[0], "PNG", **animation),
        "interlaced": _adam7(),
        "lossless": encode(rgba, "WEBP", lossless=True),
        "webp animation": encode(frames[0], "WEBP", **animation),
        "webp exif": encode(picture(), "WEBP", exif=picture().getexif().tobytes()),
        "gif": encode(picture().convert("P"), "GIF"),
        "gif animation": encode(frames[0].convert("P"), "GIF", **animation),
        "gif transparent": encode(picture().convert("P"), "GIF", transparency=3),
        "bmp": encode(picture(), "BMP"),
        "mpo": encode(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
        "tiff float": encode(floats, "TIFF"),
        "tiff pages": encode(picture(), "TIFF", save_all=True, append_images=[picture(seed=1)]),
        "tiff big": encode(picture(), "TIFF", big_tiff=True),
        "tiff sixteen": encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "TIFF"),
        "tiff thirty-two": encode(Image.fromarray(np.arange(0, 60_000, 50, dtype=np.int32).reshape(30, 40)), "TIFF"),
        "tiff lab": encode(Image.fromarray(np.asarray(picture()), "LAB"), "TIFF"),
        "ppm": encode(picture(), "PPM"),
        "ico": encode(rgba, "ICO", sizes=[(16, 16)]),
        "eps": encode(picture(), "EPS"),
        "tga": encode(picture(), "TGA"),
    }
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "tiff_adobe_deflate"):
        made[f"tiff {compression}"] = encode(picture(), "TIFF", compression=compression)
    made["tiff fax"] = encode(picture().convert("1"), "TIFF", compression="group4")
    made["tiff alpha"] = encode(rgba, "TIFF")
    return {**all_kinds(), **made}


def _text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("plain", "t" * 500)
    info.add_text("packed", "t" * 5000, zip=True)
    info.add_itxt("international", "ü" * 500, "de", "Text", zip=True)
    return info


def _adam7() -> bytes:
    """An 8 x 8 interlaced grey PNG, by hand: Pillow writes none."""
    passes = ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
    rows = b"".join((b"\0" + bytes(range(width))) * height for width, height in passes)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes, crc: int | None = None, length: int | None = None) -> bytes:
    check = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content) if length is None else length) + kind + content + struct.pack(">I", check)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += length + 12


def _png(data: bytes, draw: random.Random) -> bytes:
    """Chunks with another size, order, length or checksum; bombs of text, profile or pixels."""
    chunks = list(_chunks(data))
    what = draw.choice(("size", "depth", "length", "crc", "order", "twice", "bomb", "empty", "pixels"))
    at = draw.randrange(len(chunks))
    kind, content = chunks[at]
    if what == "size":
        chunks[0] = b"IHDR", struct.pack(">II", draw.choice(_SIDES), draw.choice(_SIDES)) + chunks[0][1][8:]
    elif what == "depth":
        chunks[0] = b"IHDR", chunks[0][1][:8] + bytes(draw.choice((0, 1, 2, 3, 4, 6, 8, 16, 255)) for _ in range(5))
    elif what == "order":
        draw.shuffle(chunks)
    elif what == "twice":
        chunks[at:at] = [chunks[at]] * draw.choice((1, 100))
    elif what == "bomb":
        chunks[1:1] = [_bomb(draw)] * draw.choice((1, 3, 80))
    elif what == "empty":
        chunks[1:1] = [(draw.choice((b"IDAT", b"tEXt", b"prVt", b"fcTL")), b"")] * 20_000
    elif what == "pixels":
        side = draw.choice((1000, 3000, 3000, 9999))
        header = struct.pack(">IIBBBBB", side, side, 8, draw.choice((0, 2, 6)), 0, 0, draw.choice((0, 1)))
        chunks = [(b"IHDR", header), (b"IDAT", _zeros(side * (side * 4 + 1))), (b"IEND", b"")]
    encoded = [_chunk(kind, content) for kind, content in chunks]
    if what == "crc":
        encoded[at] = _chunk(kind, content, crc=draw.getrandbits(32))
    elif what == "length":
        encoded[at] = _chunk(kind, content, length=draw.choice((0, 1, len(content) + 1, 2**31 - 1, 2**32 - 1)))
    return _PNG + b"".join(encoded)


@cache
def _zeros(length: int) -> bytes:
    """Zeros, compressed a thousandfold."""
    packer = zlib.compressobj()
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range((length >> 20) + 1)) + packer.flush()


def _bomb(draw: random.Random) -> tuple[bytes, bytes]:
    packed = _zeros(draw.choice((1 << 20, 1 << 26, 1 << 28)))
    return draw.choice(
        (
            (b"zTXt", b"key\0\0" + packed),
            (b"iTXt", b"key\0\1\0en\0key\0" + packed),
            (b"iCCP", b"profile\0\0" + packed),
            (b"tEXt", b"key\0" + b"t" * 2_000_000),
            (b"eXIf", _directory(draw)),
        )
    )


def _directory(draw: random.Random) -> bytes:
    """A TIFF directory, as EXIF holds one, whose entries claim much and overlap."""
    count = draw.choice((1, 100, 5000, 65_535))
    entries = b"".join(
        struct.pack("<HHII", draw.randrange(65_536), draw.randrange(14), draw.choice((1, 1000, 60_000, 2**31)), 8)
        for _ in range(min(count, 5000))
    )
    orientation = struct.pack("<HHII", 0x0112, draw.choice((3, 2, 5)), draw.choice((1, 0, 9)), draw.randrange(10))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + orientation + entries + struct.pack("<I", 8)


def _jpeg(data: bytes, draw: random.Random) -> bytes:
    """Another size; segments of EXIF, profiles and comments; many scans."""
    what = draw.choice(("size", "exif", "profile", "comments", "scans", "segments"))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if what == "size":
        sides = struct.pack(">HH", *(draw.choice((0, 1, 9999, 10_001, 65_535)) for _ in range(2)))
        return data[: frame + 5] + sides + data[frame + 9 :]
    if what == "scans":
        scan, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
        return data[:end] + data[scan:end] * draw.choice((1, 50, 2000)) + data[end:]
    exif = b"Exif\0\0" + _directory(draw)[:60_000]
    profile = b"ICC_PROFILE\0\1" + bytes([draw.randrange(256)]) + bytes(60_000)
    kind, content = {
        "exif": (b"\xff\xe1", exif),
        "profile": (b"\xff\xe2", profile),
        "comments": (b"\xff\xfe", bytes(60_000)),
        "segments": (b"\xff\xef", b""),
    }[what]
    segment = kind + struct.pack(">H", len(content) + 2) + content
    return data[:2] + segment * draw.choice((1, 2, 100, 300)) + data[2:]


def _gif(data: bytes, draw: random.Random) -> bytes:
    """Another canvas or frame; long comments."""
    sides = struct.pack("<HH", *(draw.choice((0, 1, 9999, 10_001, 65_535)) for _ in range(2)))
    frame = data.find(b",")
    what = draw.choice(("canvas", "frame", "comments", "frames"))
    if what == "canvas":
        return data[:6] + sides + data[10:]
    if what == "frame":
        return data[: frame + 5] + sides + data[frame + 9 :]
    if what == "comments":
        comment = b"!\xfe" + (b"\xff" + b"c" * 255) * draw.choice((1, 10_000)) + b"\0"
        return data[:frame] + comment * draw.choice((1, 5)) + data[frame:]
    return data[:-1] + data[frame:-1] * draw.choice((10, 2000)) + b";"


def _tiff(data: bytes, draw: random.Random) -> bytes:
    """An entry of the first directory with another tag, type, count or value."""
    if data[2:4] != b"*\0":
        return data
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    if what := draw.randrange(4):
        changed = bytearray(data)
        for _ in range(what):
            field = at + 2 + 12 * draw.randrange(count) + draw.choice((0, 2, 4, 8, 8, 8))
            struct.pack_into("<I", changed, field, draw.choice((*_SIDES, 3, 8, 259, 5, 6, 7, 32_773, 50_000)) % 2**32)
        return bytes(changed)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + _directory(draw)[8:]


def _webp(data: bytes, draw: random.Random) -> bytes:
    """Another canvas in the extended header; chunks with other lengths; EXIF."""
    what = draw.choice(("canvas", "exif", "length"))
    at = data.find(b"VP8X")
    if what == "length" or at < 0:
        at = draw.choice(
            [place for place in range(12, min(len(data) - 8, 400), 2) if data[place : place + 1].isalpha()]
        )
        return data[: at + 4] + struct.pack("<I", draw.choice(_SIDES)) + data[at + 8 :]
    if what == "canvas":
        sides = b"".join(struct.pack("<I", draw.choice((0, 1, 9998, 16_382, 2**24 - 1)))[:3] for _ in range(2))
        return data[: at + 12] + sides + data[at + 18 :]
    exif = _directory(draw)
    exif += b"\0" * (len(exif) % 2)
    joined = data[8:] + b"EXIF" + struct.pack("<I", len(exif)) + exif
    return (
        b"RIFF"
        + struct.pack("<I", len(joined))
        + joined[: joined.find(b"VP8X") + 8]
        + b"\x08"
        + joined[joined.find(b"VP8X") + 9 :]
    )


_SPECIAL: tuple[tuple[bytes, Callable[[bytes, random.Random], bytes]], ...] = (
    (_PNG, _png),
    (b"\xff\xd8", _jpeg),
    (b"GIF8", _gif),
    (b"II*\0", _tiff),
    (b"RIFF", _webp),
)
