"""The toy world's true reward, computed exactly from a picture and its caption.

For evaluation only: no training step, label or reward model may use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smpo_pipeline.toy.caption_fit import fit_captions

COLOUR_TOLERANCE = 0.06
"""Mean squared RGB error (values in [0, 1]) at which the reward falls to 1/e."""


def true_reward(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Measure how well each picture shows its caption.

    The squared soft Dice of the caption's shape at its best position, times exp(-colour error / COLOUR_TOLERANCE). The
    shape's position does not matter.

    Args:
        images: N pictures, uint8 [32, 32, 3], RGB.
        captions: N captions of the world.

    Returns:
        float64 [N], from 0 (nothing fits) to 1 (a perfect render).

    Raises:
        ValueError: lengths, shapes or types are wrong, or a caption is not the world's.
    """
    fit = fit_captions(images, captions)
    return fit.dice**2 * np.exp(-fit.colour_error / COLOUR_TOLERANCE)
