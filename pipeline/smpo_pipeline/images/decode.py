"""Decode image files to upright RGB, and resize them.

Resizing follows the published preprocessing (the training code of Diffusion-DPO and SmPO): torchvision's ``Resize`` of
the shorter side to the resolution, bilinear, then ``CenterCrop``. PIL's bilinear filter widens with the reduction, so
it antialiases.
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
from smpo_schemas.reject_kinds import RejectKind

MAX_PIXELS = 100_000_000
"""Larger images are rejected. Decoding one takes up to 1 GB, and several are decoded at once."""

MAX_ASPECT = 100
"""Thinner images are rejected: scaled up until the shorter side has the model's resolution, they exhaust memory."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
"""Accepted formats. Pillow has dozens more, most of them little tested; one starts Ghostscript."""

MAX_CHUNKS = 100_000
"""PNGs with more chunks are rejected; the usual encoder makes one for each 8 kB of pixels."""

MAX_SEGMENTS = 500
"""JPEGs with more segments before their pixels are rejected; a colour profile takes up to 255."""

MAX_JUNK = 1_000_000
"""JPEGs with more bytes between their segments are rejected."""

MAX_MARKERS = 10_000
"""JPEGs with more markers after their first scan are rejected: they are counted in Python."""

MAX_SCANNED = 2_000_000_000
"""Progressive JPEGs with a larger product of scans and pixels are rejected: each scan, however few bytes it has, goes
over the whole image. 10 scans are usual."""

_PNG, _JPEG, _SCAN, _END = b"\x89PNG", b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_MARKER = re.compile(rb"\xff+[^\xff]", re.DOTALL)

_WITH_LENGTH = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""JPEG markers that are followed by a length, and the end marker."""

_NEEDED_CHUNKS = (b"tRNS", b"eXIf")
"""PNG chunks that the pixels or their rotation depend on, besides the critical ones (named with a capital)."""

_TEXT, _EXIF_IN_TEXT = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")

_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_WHITES = {"F": (1, 255), "I": (255, 65535)}
"""Possible values of white for grey whose depth does not determine it: floats, and 32-bit or signed integers."""

_SIGNED_WHITES = (255, 32767)
"""The same for signed 16-bit grey, which Pillow returns as 32 bits."""

_BITS, _PHOTOMETRIC, _PARTS, _PART_BYTES, _FORMAT = 258, 262, (273, 324), (279, 325), 339
"""TIFF tags; parts are strips or tiles."""

_OVERLAP = 2
"""Most bytes of a TIFF's strips or tiles, as a multiple of the file's size."""

_BAND_ROWS = 256
"""Rows that are converted at once: converting a whole image would take several times its memory."""


class ImageRejectedError(Exception):
    """An image that cannot be used; the message is the reason in ``rejected.parquet``."""

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to upright 8-bit RGB.

    The EXIF rotation is applied; transparency is composed over white; deep grey (of more than 8 bits) is scaled to 8
    bits (Pillow's conversion would clip it); CMYK, L*a*b*, palette and grey images are converted. Colour profiles are
    ignored, as by the published preprocessing. The first frame of an animation is used.

    Raises:
        ImageRejectedError: not an image, truncated, above a limit of this module, or grey without a known white.
    """
    try:
        with warnings.catch_warnings():
            # PIL warns about every odd tag, and a file can have 60,000. Its warning about large images is replaced by
            # our own limit, which is checked from the header before any pixel is decoded.
            warnings.simplefilter("ignore")
            if data.startswith(_PNG):
                data = _without_metadata(data)
            elif data.startswith(_JPEG):
                _check_segments(data)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageRejectedError(
                        f"{RejectKind.IMAGE_TOO_LARGE}: {width} x {height} pixels, above {MAX_PIXELS}"
                    )
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise ImageRejectedError(
                        f"{RejectKind.IMAGE_TOO_THIN}: {width} x {height} pixels, above {MAX_ASPECT} to 1"
                    )
                scans = _count_scans(image, data)
                if scans * width * height > MAX_SCANNED:
                    raise ImageRejectedError(
                        f"{RejectKind.IMAGE_TOO_SLOW}: {scans:.4g} scans of {width} x {height} pixels"
                    )
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except (ImageRejectedError, MemoryError):  # lack of memory may not be the file's fault
        raise
    except UnidentifiedImageError as error:  # its message has only a memory address
        raise ImageRejectedError(f"{RejectKind.IMAGE_NOT_READABLE}: not one of {', '.join(_FORMATS)}") from error
    except Exception as error:  # PIL's plugins raise anything from struct.error to SyntaxError on damaged files
        raise ImageRejectedError(f"{RejectKind.IMAGE_NOT_READABLE}: {type(error).__name__}: {error}") from error


def _without_metadata(data: bytes) -> bytes:
    """Drop the chunks of a PNG that neither pixels nor rotation depend on: Pillow would unpack texts of any size.

    Raises:
        ImageRejectedError: it has more than :data:`MAX_CHUNKS` chunks; Pillow needs time for each.
    """
    chunks, at = [data[:8]], 8
    for _ in range(MAX_CHUNKS):
        kind, content = data[at + 4 : at + 8], at + 8
        end = content + int.from_bytes(data[at : at + 4]) + 4
        exif = kind in _TEXT and data.startswith(_EXIF_IN_TEXT, content)
        exif = exif and _fits_in_text(kind, data[content : end - 4])
        if exif or kind in _NEEDED_CHUNKS or not (kind.isalpha() and kind[:1].islower()):
            chunks.append(data[at:end])
        if kind == b"IEND" or end >= len(data):
            return b"".join(chunks)
        at = end
    raise ImageRejectedError(f"{RejectKind.IMAGE_TOO_SLOW}: a PNG of more than {MAX_CHUNKS} chunks")


def _fits_in_text(kind: bytes, text: bytes) -> bool:
    """Whether a text chunk is within Pillow's limit; it refuses the whole image for a larger one."""
    rest = text.partition(b"\0")[2]
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1].strip(b"\0"):
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return True
    try:
        return len(zlib.decompressobj().decompress(packed, MAX_TEXT_CHUNK + 1)) <= MAX_TEXT_CHUNK
    except zlib.error:  # Pillow ignores such a text
        return True


def _check_segments(data: bytes) -> None:
    """Limit the segments before a JPEG's pixels: Pillow parses them in Python, which can be made to take minutes.

    Raises:
        ImageRejectedError: more than :data:`MAX_SEGMENTS` segments or :data:`MAX_JUNK` bytes between them.
    """
    at, junk = len(_JPEG), 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(data, at)
        junk += (marker.end() if marker else len(data)) - at - 2
        if junk > MAX_JUNK:
            raise ImageRejectedError(
                f"{RejectKind.IMAGE_TOO_SLOW}: a JPEG with more than {MAX_JUNK} bytes between segments"
            )
        if not marker or marker[0].endswith(_SCAN):
            return
        *_, handler = MARKER.get(int.from_bytes(marker[0][-2:]), (None,))
        at = marker.end() + (max(2, int.from_bytes(data[marker.end() : marker.end() + 2])) if handler else 0)
    raise ImageRejectedError(f"{RejectKind.IMAGE_TOO_SLOW}: a JPEG of more than {MAX_SEGMENTS} segments")


def _count_scans(image: Image.Image, data: bytes) -> float:
    """Count the scans of a JPEG, or the mean scans of the JPEG strips or tiles of a TIFF; 0 for other formats.

    Markers inside segments, or after the end of the image, are not scans.

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
        raise ImageRejectedError(f"{RejectKind.IMAGE_TOO_SLOW}: a JPEG of more than {MAX_MARKERS} markers")
    if not isinstance(image, TiffImageFile) or image.info.get("compression") != "jpeg":
        return 0
    tags = image.tag_v2
    starts, sizes = (next((tags[tag] for tag in either if tag in tags), ()) for either in (_PARTS, _PART_BYTES))
    if sum(sizes) > _OVERLAP * len(data):
        raise ImageRejectedError(f"{RejectKind.IMAGE_TOO_SLOW}: the strips of a TIFF overlap")
    scans = sum(data.count(_SCAN, start, start + size) for start, size in zip(starts, sizes, strict=False))
    return scans / max(1, len(starts))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_GREY:
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale deep grey so that its white is 255; transparent pixels become white.

    Raises:
        ImageRejectedError: neither the depth nor the values tell what white is.
    """
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits = tags.get(_BITS, (16,))[0]
    if image.mode in _WHITES:
        signed = image.mode == "I" and bits == 16 and tags.get(_FORMAT, (1,))[0] == 2  # noqa: PLR2004  (the tag's value for signed)
        white = _white_of(image, _SIGNED_WHITES if signed else _WHITES[image.mode])
    else:
        white = 2**bits - 1
    grey = Image.new("L", image.size)
    for top, rows in _rows_of(image):
        scaled = np.clip(np.asarray(rows) / np.float32(white), 0, 1)
        # Pillow inverts "white is zero" images only if they have 8 bits.
        scaled = 1 - scaled if tags.get(_PHOTOMETRIC) == 0 else scaled
        # A PNG may declare one grey value as transparent.
        scaled[np.asarray(rows) == image.info.get("transparency", -1)] = 1
        grey.paste(Image.fromarray(np.rint(scaled * 255).astype(np.uint8)), (0, top))
    return grey


def _white_of(image: Image.Image, whites: tuple[int, int]) -> int:
    """Choose the smaller of two possible whites if no value is above it, the larger if the largest value is near it."""
    values = [(part.min(), part.max()) for _, rows in _rows_of(image) for part in [np.asarray(rows)]]
    low, high = np.min(values), np.max(values)  # NaN if any value is
    first, second = whites
    if low >= 0 and high <= first:
        return first
    if low >= 0 and second / 16 <= high <= second:
        return second
    raise ImageRejectedError(
        f"{RejectKind.UNKNOWN_WHITE}: deep grey values from {low:g} to {high:g}; the largest is expected to be at most "
        f"{first}, or from {second // 16} to {second}"
    )


def _rows_of(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield bands of an image, each with the number of its first row."""
    for top in range(0, image.height, _BAND_ROWS):
        yield top, image.crop((0, top, image.width, min(image.height, top + _BAND_ROWS)))


def _over_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    for top, part in _rows_of(image):
        rows = part.convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", rows.size, "white"), rows).convert("RGB"), (0, top))
    return flat


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize the image to just cover ``size``, then crop the centre.

    Args:
        image: of any size.
        size: height and width.

    Returns:
        uint8 [height, width, 3], and the crop's (top, left) in pixels of the resized image.
    """
    height, width = size
    # As torchvision does for a square: the longer side is truncated to whole pixels, and the crop's corner rounded half
    # to even.
    if height * image.width >= width * image.height:
        whole = (height * image.width // image.height, height)
    else:
        whole = (width, width * image.height // image.width)
    left, top = (round((side - cropped) / 2) for side, cropped in zip(whole, (width, height), strict=True))
    crop = image.resize(whole, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    return np.asarray(crop), (top, left)
