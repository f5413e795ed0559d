"""Encode sampled images as files. Does not import torch: encoding workers start fast."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from smpo_schemas.generation.candidates import ImageFormat

_OPTIONS: dict[ImageFormat, dict[str, Any]] = {
    "png": {},
    "webp": {"lossless": True},
    "jpeg": {"quality": 95, "subsampling": 0},
}


def encode_image(pixels_HW3: np.ndarray, image_format: ImageFormat) -> bytes:
    """Encode uint8 RGB pixels: PNG and WebP without loss, JPEG at quality 95 with full colour resolution."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, format=image_format, **_OPTIONS[image_format])
    return buffer.getvalue()
