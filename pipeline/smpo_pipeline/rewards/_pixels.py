"""Image preprocessing of OpenAI's CLIP, which several rewards took over: torchvision's steps on PIL images, without it.

transformers' CLIP processor crops one pixel off where the difference of the sides is odd, so it cannot stand in.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

_MEAN_311 = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_STD_311 = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def normalise(pixels_3hw: torch.Tensor) -> torch.Tensor:
    """Float32 values of 0 to 1, standardised by CLIP's mean and standard deviation."""
    return (pixels_3hw - _MEAN_311) / _STD_311


def clip_pixels(image: Image.Image, side: int) -> torch.Tensor:
    """Shorter side to ``side`` with PIL's bicubic filter, centre crop, [0, 1], standardised.

    Returns:
        Float32 [3, side, side].
    """
    width, height = image.size
    shorter = min(width, height)
    # The longer side is cut to whole pixels, and the crop's corner rounded half to even, as torchvision does.
    size = (width * side // shorter, height * side // shorter)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    crop = np.asarray(resized.crop((left, top, left + side, top + side)))
    return normalise(torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 255)
