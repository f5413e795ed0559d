"""The true reward of the embedded world, computed exactly from a picture and its caption.

It is for evaluation only: no training step, no label and no reward model may see it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smpo_pipeline.toy.caption_fit import fit_captions

COLOUR_TOLERANCE = 0.06
"""Mean squared RGB error (values in [0, 1]) at which the reward falls to 1/e."""


def true_reward(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """How well each picture shows what its caption says.

    Soft Dice squared of the caption's shape at its best position, times exp(-colour error / COLOUR_TOLERANCE).
    Where in the picture the shape lies does not matter.

    Args:
        images: N pictures, uint8 [32, 32, 3], RGB.
        captions: N captions of the world.

    Returns:
        float64 [N], 0 (nothing fits) to 1 (a perfect render).

    Raises:
        ValueError: numbers, shapes or types that do not fit, or a caption that is not of this world.
    """
    fit = fit_captions(images, captions)
    return fit.dice**2 * np.exp(-fit.colour_error / COLOUR_TOLERANCE)
