"""What kind of file an image is, checked by decoding it whole."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from smpo_pipeline.images.decoder import worker_decoder


@dataclass(frozen=True)
class ImageHeader:
    """Format and PIL mode of the file; width and height in pixels after its EXIF rotation; file size in bytes."""

    format: str
    mode: str
    width: int
    height: int
    bytes: int


def read_header(data: bytes) -> ImageHeader:
    """Decode an image as the pipeline does and say what it is.

    Raises:
        ImageRejectedError: the pipeline would reject it.
    """
    height, width, _ = worker_decoder().decode(data).shape
    with Image.open(io.BytesIO(data)) as image:
        return ImageHeader(image.format or "?", image.mode, width, height, len(data))
