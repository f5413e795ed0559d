from __future__ import annotations

import io

import numpy as np
from PIL import Image

from smpo_pipeline.generation.encoding import encode_image
from smpo_pipeline.images.decode import decode_image
from tests.pictures import picture


def test_formats() -> None:
    pixels = np.asarray(picture(48, 32))
    for image_format in ("png", "webp", "jpeg"):
        data = encode_image(pixels, image_format)
        assert Image.open(io.BytesIO(data)).format == image_format.upper()
        difference = np.abs(np.asarray(decode_image(data), int) - pixels)
        assert difference.mean() < 3 if image_format == "jpeg" else difference.max() == 0
