"""Encoded image files in, upright RGB images and model-sized pixels out.

The published preprocessing (Diffusion-DPO's and SmPO's training code): torchvision's ``Resize`` of the shorter side to
the resolution, bilinear, and ``CenterCrop``, then [-1, 1]. PIL's bilinear filter widens with the reduction, so it
antialiases.
"""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import MARKER

from smpo_schemas.errors import one_line

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

MAX_SCANNED = 2_000_000_000
"""Progressive JPEGs whose scans times their pixels are more are rejected: each scan, of some bytes, goes over the whole
image. 10 scans are usual."""

_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
_MARKER = re.compile(rb"\xff+[^\xff]", re.DOTALL)

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_FULL_SCALE_16 = 65535

_ROWS = 256


class ImageRejectedError(Exception):
    """An image that cannot be used; the message is the reason that the rejects table records."""

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to upright 8-bit RGB.

    The EXIF rotation is applied; transparency is composed over white; 16-bit grey is scaled to 8 bits (a plain
    conversion would clip it to white); CMYK, palette and grey images are converted. Of an animation, the first frame.

    Raises:
        ImageRejectedError: no image, cut short, above :data:`MAX_PIXELS`, or thinner than :data:`MAX_ASPECT`.
    """
    try:
        with warnings.catch_warnings():
            # PIL warns of every odd tag, of which a file can have 60,000. Its warning of large images is replaced by
            # our own limit, checked from the header before any pixel is decoded.
            warnings.simplefilter("ignore")
            _check_parts(data)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageRejectedError(f"image too large: {width} x {height} pixels, above {MAX_PIXELS}")
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise ImageRejectedError(f"image too thin: {width} x {height} pixels, above {MAX_ASPECT} to 1")
                if _is_jpeg(image) and data.count(_SCAN) * width * height > MAX_SCANNED:
                    raise ImageRejectedError(f"image too slow: {data.count(_SCAN)} scans of {width} x {height} pixels")
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except (ImageRejectedError, MemoryError):  # the machine's memory may have run out: no fault of the file's
        raise
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise ImageRejectedError(f"image not readable: none of {', '.join(_FORMATS)}") from error
    except Exception as error:  # PIL's plugins raise anything from struct.error to SyntaxError on damaged files
        raise ImageRejectedError(f"image not readable: {type(error).__name__}: {error}") from error


def _check_parts(data: bytes) -> None:
    """Count what a file is made of: Pillow goes through it in Python, which a file can make take minutes.

    Raises:
        ImageRejectedError: a PNG has more than :data:`MAX_CHUNKS` chunks, or a JPEG, before its pixels, more than
            :data:`MAX_SEGMENTS` segments or :data:`MAX_JUNK` bytes between them.
    """
    if data.startswith(b"\x89PNG"):
        at = 8
        for _ in range(MAX_CHUNKS):
            at += 12 + int.from_bytes(data[at : at + 4])
            if at >= len(data):
                return
        raise ImageRejectedError(f"image too slow: a PNG of more than {MAX_CHUNKS} chunks")
    if data.startswith(_JPEG):
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


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        # A table, since arithmetic on a large image would take several times its memory.
        scaled = np.rint(np.arange(_FULL_SCALE_16 + 1) / _FULL_SCALE_16 * 255).astype(np.uint8)
        image = Image.fromarray(scaled[np.clip(np.asarray(image), 0, _FULL_SCALE_16)], mode="L")
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Compose over white, some rows at a time: the steps between would take four times a large image's memory."""
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, _ROWS):
        rows = image.crop((0, top, image.width, min(image.height, top + _ROWS))).convert("RGBA")
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
