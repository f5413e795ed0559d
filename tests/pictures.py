"""Encoded pictures of all kinds that people's data sets hold."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sixteen_bit_grey(width: int = 40, height: int = 30) -> tuple[bytes, np.ndarray]:
    """A 16-bit grey PNG, and its values."""
    values = np.linspace(0, 65535, width * height).reshape(height, width).astype(np.uint16)
    return encode(Image.fromarray(values), "PNG"), values


def rotated(degrees_tag: int = 6) -> bytes:
    """A JPEG that EXIF says to rotate (6: by 90 degrees)."""
    image = picture()
    exif = image.getexif()
    exif[0x0112] = degrees_tag
    return encode(image, exif=exif.tobytes(), quality=95)


def all_kinds() -> dict[str, bytes]:
    """One of each kind that is readable."""
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    return {
        "jpeg": encode(picture()),
        "large": encode(picture(700, 300)),
        "grey": encode(picture().convert("L")),
        "cmyk": encode(picture().convert("CMYK")),
        "rgba": encode(rgba, "PNG"),
        "palette": encode(picture().convert("P"), "PNG", transparency=0),
        "bilevel": encode(picture().convert("1"), "PNG"),
        "sixteen": sixteen_bit_grey()[0],
        "rotated": rotated(),
        "webp": encode(picture(), "WEBP"),
        "one pixel": encode(picture(1, 1), "PNG"),
        "narrow": encode(picture(3, 90), "PNG"),
        "flat": encode(picture(90, 3), "PNG"),
    }
