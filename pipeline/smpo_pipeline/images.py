"""Encoded image files in, upright RGB images and model-sized pixels out.

The published preprocessing (Diffusion-DPO's and SmPO's training code): shorter side to the resolution with a bilinear
filter, centre crop, [-1, 1]. PIL's bilinear filter widens with the reduction, so it antialiases.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from smpo_schemas.errors import one_line

MAX_PIXELS = 100_000_000
"""Larger images are rejected: at 300 MB decoded, a few at once would fill a worker."""

MAX_ASPECT = 100
"""Thinner images are rejected: with the shorter side scaled up to a model's resolution, they would fill a worker."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
"""What is read. Pillow knows dozens more: decoders that hardly anybody tests, and one that starts Ghostscript."""

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_FULL_SCALE_16 = 65535


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
            # Our own limit, checked from the header before any pixel is decoded, replaces PIL's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageRejectedError(f"image too large: {width} x {height} pixels, above {MAX_PIXELS}")
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise ImageRejectedError(f"image too thin: {width} x {height} pixels, above {MAX_ASPECT} to 1")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except ImageRejectedError:
        raise
    except UnidentifiedImageError as error:  # its own message names an address in memory
        raise ImageRejectedError(f"image not readable: none of {', '.join(_FORMATS)}") from error
    except Exception as error:  # PIL's plugins raise anything from struct.error to SyntaxError on damaged files
        raise ImageRejectedError(f"image not readable: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        # A table, since arithmetic on a large image would take several times its memory.
        scaled = np.rint(np.arange(_FULL_SCALE_16 + 1) / _FULL_SCALE_16 * 255).astype(np.uint8)
        image = Image.fromarray(scaled[np.clip(np.asarray(image), 0, _FULL_SCALE_16)], mode="L")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, resolution: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Scale the shorter side to ``resolution`` (up or down), then crop the centre.

    Returns:
        uint8 [resolution, resolution, 3], and the crop's (top, left) in pixels of the resized image.
    """
    width, height = image.size
    scale = resolution / min(width, height)
    resized = image.resize(
        (max(resolution, round(width * scale)), max(resolution, round(height * scale))), Image.Resampling.BILINEAR
    )
    top, left = (resized.height - resolution) // 2, (resized.width - resolution) // 2
    crop = resized.crop((left, top, left + resolution, top + resolution))
    return np.asarray(crop), (top, left)
