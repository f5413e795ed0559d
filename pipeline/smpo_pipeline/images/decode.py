"""Encoded image files in, upright RGB images and model-sized pixels out.

The published preprocessing (Diffusion-DPO's and SmPO's training code): torchvision's ``Resize`` of the shorter side to
the resolution, bilinear, and ``CenterCrop``, then [-1, 1]. PIL's bilinear filter widens with the reduction, so it
antialiases.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import MARKER
from PIL.PngImagePlugin import MAX_TEXT_CHUNK
from PIL.TiffImagePlugin import TiffImageFile

from smpo_common.errors import one_line

MAX_PIXELS = 100_000_000
"""Larger images are rejected: at up to 1 GB while they are decoded, a few at once would fill a worker."""

MAX_ASPECT = 100
"""Thinner images are rejected: with the shorter side scaled up to a model's resolution, they would fill a worker."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
"""What is read. Pillow knows dozens more: decoders that hardly anybody tests, and one that starts Ghostscript."""

MAX_CHUNKS = 100_000
"""PNGs of more are rejected; the usual encoder makes one for each 8 kB of pixels."""

MAX_SEGMENTS = 500
"""JPEGs with more before their pixels are rejected; a colour profile takes up to 255."""

MAX_JUNK = 1_000_000
"""JPEGs with more bytes between their segments are rejected."""

MAX_MARKERS = 10_000
"""JPEGs with more from the first of their scans on are rejected: those are counted in Python."""

MAX_SCANNED = 2_000_000_000
"""Progressive JPEGs whose scans times their pixels are more are rejected: each scan, of some bytes, goes over the whole
image. 10 scans are usual."""

_PNG, _JPEG, _SCAN, _END = b"\x89PNG", b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff+[^\xff]", re.DOTALL)

_WITH_LENGTH = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""Of a JPEG's markers those that a length follows, and the end."""

_OF_PIXELS = (b"tRNS", b"eXIf")
"""Chunks of a PNG that the image depends on, besides those that no reader may skip (named with a capital)."""

_TEXT, _EXIF_IN_TEXT = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")

_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_WHITES = {"F": (1, 255), "I": (255, 65535)}
"""Of grey whose depth does not say it: in floating point, in integers of 32 bits or with a sign."""

_SIGNED_WHITES = (255, 32767)
"""The same in 16 bits with a sign, which Pillow gives as 32 bits."""

_BITS, _PHOTOMETRIC, _PARTS, _PART_BYTES, _FORMAT = 258, 262, (273, 324), (279, 325), 339
"""Tags of a TIFF; parts are strips or tiles."""

_OVERLAP = 2
"""Bytes of a TIFF's strips or tiles, over those of the file."""

_ROWS = 256


class ImageRejectedError(Exception):
    """An image that cannot be used; the message is the reason that the rejects table records."""

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to upright 8-bit RGB.

    The EXIF rotation is applied; transparency is composed over white; grey of more bits is scaled to 8 (a plain
    conversion would clip it); CMYK, L*a*b*, palette and grey images are converted. Colour profiles are not looked at,
    nor are they by the published preprocessing. Of an animation, the first frame.

    Raises:
        ImageRejectedError: no image, cut short, above :data:`MAX_PIXELS`, thinner than :data:`MAX_ASPECT`, or grey of
            which nobody knows what white is.
    """
    try:
        with warnings.catch_warnings():
            # PIL warns of every odd tag, of which a file can have 60,000. Its warning of large images is replaced by
            # our own limit, checked from the header before any pixel is decoded.
            warnings.simplefilter("ignore")
            if data.startswith(_PNG):
                data = _without_ballast(data)
            elif data.startswith(_JPEG):
                _check_segments(data)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageRejectedError(f"image too large: {width} x {height} pixels, above {MAX_PIXELS}")
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise ImageRejectedError(f"image too thin: {width} x {height} pixels, above {MAX_ASPECT} to 1")
                scans = _count_scans(image, data)
                if scans * width * height > MAX_SCANNED:
                    raise ImageRejectedError(f"image too slow: {scans:.4g} scans of {width} x {height} pixels")
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except (ImageRejectedError, MemoryError):  # the machine's memory may have run out: no fault of the file's
        raise
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise ImageRejectedError(f"image not readable: none of {', '.join(_FORMATS)}") from error
    except Exception as error:  # PIL's plugins raise anything from struct.error to SyntaxError on damaged files
        raise ImageRejectedError(f"image not readable: {type(error).__name__}: {error}") from error


def _without_ballast(data: bytes) -> bytes:
    """What the pixels of a PNG and their rotation depend on: texts and profiles, of any size, are not given to Pillow.

    Raises:
        ImageRejectedError: it has more than :data:`MAX_CHUNKS` chunks, for each of which Pillow takes its time.
    """
    kept, at = [data[:8]], 8
    for _ in range(MAX_CHUNKS):
        kind, content = data[at + 4 : at + 8], at + 8
        end = content + int.from_bytes(data[at : at + 4]) + 4
        exif = kind in _TEXT and data.startswith(_EXIF_IN_TEXT, content)
        exif = exif and _fits_in_text(kind, data[content : end - 4])
        if exif or kind in _OF_PIXELS or not (kind.isalpha() and kind[:1].islower()):
            kept.append(data[at:end])
        if kind == b"IEND" or end >= len(data):
            return b"".join(kept)
        at = end
    raise ImageRejectedError(f"image too slow: a PNG of more than {MAX_CHUNKS} chunks")


def _fits_in_text(kind: bytes, text: bytes) -> bool:
    """Whether Pillow unpacks a text chunk; it refuses the whole image for one that is larger than its limit."""
    rest = text.partition(b"\0")[2]
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1].strip(b"\0"):
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return True
    try:
        return len(zlib.decompressobj().decompress(packed, MAX_TEXT_CHUNK + 1)) <= MAX_TEXT_CHUNK
    except zlib.error:  # which Pillow passes over
        return True


def _check_segments(data: bytes) -> None:
    """Count what stands before a JPEG's pixels: Pillow goes through it in Python, which a file can make take minutes.

    Raises:
        ImageRejectedError: more than :data:`MAX_SEGMENTS` segments or :data:`MAX_JUNK` bytes between them.
    """
    at, junk = len(_JPEG), 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(data, at)
        junk += (marker.end() if marker else len(data)) - at - 2
        if junk > MAX_JUNK:
            raise ImageRejectedError(f"image too slow: a JPEG with more than {MAX_JUNK} bytes between its segments")
        if not marker or marker[0].endswith(_SCAN):
            return
        *_, handler = MARKER.get(int.from_bytes(marker[0][-2:]), (None,))
        at = marker.end() + (max(2, int.from_bytes(data[marker.end() : marker.end() + 2])) if handler else 0)
    raise ImageRejectedError(f"image too slow: a JPEG of more than {MAX_SEGMENTS} segments")


def _count_scans(image: Image.Image, data: bytes) -> float:
    """How often a decoder of JPEG goes over the image; what stands in segments or behind the end is not counted.

    Raises:
        ImageRejectedError: more than :data:`MAX_MARKERS` markers, or a TIFF whose parts overlap.
    """
    if image.format in ("JPEG", "MPO"):
        at = scans = 0
        for _ in range(MAX_SEGMENTS + MAX_MARKERS):
            marker = _WITH_LENGTH.search(data, at)
            if not marker or marker[0] == _END:
                return scans
            scans += marker[0] == _SCAN
            at = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2]))
        raise ImageRejectedError(f"image too slow: a JPEG of more than {MAX_MARKERS} markers")
    if not isinstance(image, TiffImageFile) or image.info.get("compression") != "jpeg":
        return 0
    # Of each strip or tile, which is a JPEG of its own.
    tags = image.tag_v2
    starts, sizes = (next((tags[tag] for tag in either if tag in tags), ()) for either in (_PARTS, _PART_BYTES))
    if sum(sizes) > _OVERLAP * len(data):
        raise ImageRejectedError("image too slow: the strips of a TIFF overlap")
    scans = sum(data.count(_SCAN, start, start + size) for start, size in zip(starts, sizes, strict=False))
    return scans / max(1, len(starts))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_GREY:
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits, scaled so that its white is 255; what is transparent is white.

    Raises:
        ImageRejectedError: what its white is can be told neither from its depth nor from its values.
    """
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits = tags.get(_BITS, (16,))[0]
    if image.mode in _WHITES:
        signed = image.mode == "I" and bits == 16 and tags.get(_FORMAT, (1,))[0] == 2  # noqa: PLR2004  (the tag's word)
        white = _white_of(image, _SIGNED_WHITES if signed else _WHITES[image.mode])
    else:
        white = 2**bits - 1
    grey = Image.new("L", image.size)
    for top, rows in _rows_of(image):
        scaled = np.clip(np.asarray(rows) / np.float32(white), 0, 1)
        # Pillow turns negatives of 8 bits alone.
        scaled = 1 - scaled if tags.get(_PHOTOMETRIC) == 0 else scaled
        # The one grey that a PNG calls transparent, over white.
        scaled[np.asarray(rows) == image.info.get("transparency", -1)] = 1
        grey.paste(Image.fromarray(np.rint(scaled * 255).astype(np.uint8)), (0, top))
    return grey


def _white_of(image: Image.Image, whites: tuple[int, int]) -> int:
    """The smaller white that is possible if no value is above it, the larger one if some value is near it."""
    values = [(part.min(), part.max()) for _, rows in _rows_of(image) for part in [np.asarray(rows)]]
    low, high = np.min(values), np.max(values)  # NaN where there is one
    first, second = whites
    if low >= 0 and high <= first:
        return first
    if low >= 0 and second / 16 <= high <= second:
        return second
    raise ImageRejectedError(
        f"white of a deep grey image unknown: values from {low:g} to {high:g}; its largest is expected to be at most "
        f"{first}, or from {second // 16} to {second}"
    )


def _rows_of(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Some rows at a time, and the first one's number: steps over a whole image take several times its memory."""
    for top in range(0, image.height, _ROWS):
        yield top, image.crop((0, top, image.width, min(image.height, top + _ROWS)))


def _over_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    for top, part in _rows_of(image):
        rows = part.convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", rows.size, "white"), rows).convert("RGB"), (0, top))
    return flat


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Scale (up or down) so that ``size`` is just covered, then crop the centre.

    Args:
        image: of any size.
        size: wanted height and width; for a square, the shorter side is scaled to its side.

    Returns:
        uint8 [height, width, 3], and the crop's (top, left) in pixels of the resized image.
    """
    height, width = size
    # For a square, sizes and corner are torchvision's: the longer side cut to whole pixels, halves rounded to even.
    if height * image.width >= width * image.height:
        whole = (height * image.width // image.height, height)
    else:
        whole = (width, width * image.height // image.width)
    left, top = (round((there - wanted) / 2) for there, wanted in zip(whole, (width, height), strict=True))
    crop = image.resize(whole, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    return np.asarray(crop), (top, left)
