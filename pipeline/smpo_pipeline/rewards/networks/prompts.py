"""Prompts of very different lengths in one batch, for rewards that read them whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

_LONG = 2000
"""Characters. A longer prompt is scored alone: in a batch every row would be padded to its length, and attention takes
memory by the square of it."""

Score = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]


def long_ones_alone(score: Score, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Call ``score`` for all images with short prompts together, and for each other image alone.

    Returns:
        Scores, float64 [N], in the order of the images.
    """
    together = [number for number, prompt in enumerate(prompts) if len(prompt) <= _LONG]
    alone = [[number] for number, prompt in enumerate(prompts) if len(prompt) > _LONG]
    scores_N = np.empty(len(images))
    for rows in ([together] if together else []) + alone:
        scores_N[rows] = score([images[row] for row in rows], [prompts[row] for row in rows])
    return scores_N
