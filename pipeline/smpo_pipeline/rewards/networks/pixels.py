"""Image preprocessing of OpenAI's CLIP, as several rewards use it: torchvision's steps, without torchvision.

transformers' CLIP processor cannot replace it: its crop is off by one pixel where the sides' difference is odd.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

_MEAN_311 = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_STD_311 = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def normalise(pixels_3hw: torch.Tensor) -> torch.Tensor:
    """Standardise float32 values from 0 to 1, [3, h, w] or more, by CLIP's mean and standard deviation."""
    return (pixels_3hw - _MEAN_311.to(pixels_3hw.device)) / _STD_311.to(pixels_3hw.device)


def cropped(images_N3HW: torch.Tensor, side: int) -> torch.Tensor:
    """Resize the shorter side to ``side`` (bicubic, antialiased) and crop the centre, with gradient.

    PIL's bicubic, but in floating point: PIL rounds to 8 bits, twice.
    """
    height, width = images_N3HW.shape[2:]
    shorter = min(height, width)
    size = (height * side // shorter, width * side // shorter)
    if size != (height, width):
        images_N3HW = functional.interpolate(
            images_N3HW, size, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0, 1)
    top, left = (round((length - side) / 2) for length in size)
    return images_N3HW[:, :, top : top + side, left : left + side]


def clip_pixels(image: Image.Image, side: int) -> torch.Tensor:
    """Resize the shorter side to ``side`` (PIL's bicubic), crop the centre and standardise.

    Returns:
        Float32 [3, side, side].
    """
    width, height = image.size
    shorter = min(width, height)
    # As torchvision: truncate the longer side to whole pixels, round the crop's corner half to even.
    size = (width * side // shorter, height * side // shorter)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    crop = np.asarray(resized.crop((left, top, left + side, top + side)))
    return normalise(torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 255)
