"""Fit pictures to their captions: find the shape's best position and compare the colours."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from smpo_pipeline.toy.world import IMAGE_SIZE, RGB_OF_COLOUR, SHAPES, Scene, coverage, scene_of

_PHASES = (0.0, 0.25, 0.5, 0.75)
"""Sub-pixel offsets that are tried; no true position is more than an eighth of a pixel off."""


@dataclass(frozen=True, slots=True)
class CaptionFit:
    """The fit of N pictures to their N captions; arrays are float64 [N] unless noted."""

    dice: np.ndarray
    """Soft Dice of the shape at its best position; 1 if the picture shows exactly the caption's shape."""
    colour_error: np.ndarray
    """Mean squared error of RGB values in [0, 1] at this position; shape and background have equal weights."""
    offset: np.ndarray
    """[N, 2]: x and y of the best position, in pixels from the middle of the picture."""


def fit_captions(images: Sequence[np.ndarray], captions: Sequence[str]) -> CaptionFit:
    """Find each caption's shape in its picture.

    Args:
        images: N pictures, uint8 [32, 32, 3], RGB.
        captions: N captions of the world.

    Raises:
        ValueError: lengths, shapes or types are wrong, or a caption is not the world's.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    scenes = [scene_of(caption) for caption in captions]
    for image in images:
        if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
            got = f"{image.dtype} {list(image.shape)}"
            raise ValueError(f"images must be uint8 [{IMAGE_SIZE}, {IMAGE_SIZE}, 3], got {got}")

    dice, colour_error, offset = np.zeros(len(scenes)), np.zeros(len(scenes)), np.zeros((len(scenes), 2))
    # Pictures of the same shape and size share their templates.
    members: dict[tuple[str, float], list[int]] = defaultdict(list)
    for index, scene in enumerate(scenes):
        members[scene.shape, scene.radius].append(index)
    for (shape, radius), indices in members.items():
        pixels_NHWC = np.stack([images[index] for index in indices]).astype(np.float64) / 255
        part = _fit_shape(pixels_NHWC, [scenes[index] for index in indices], _templates(shape, radius))
        dice[indices], colour_error[indices], offset[indices] = part.dice, part.colour_error, part.offset
    return CaptionFit(dice, colour_error, offset)


@functools.lru_cache(maxsize=2 * len(SHAPES))
def _templates(shape: str, radius: float) -> np.ndarray:
    """Draw the shape at each sub-pixel offset: float64 [P, k, k], where k is its width plus one pixel."""
    width = int(2 * radius) + 1
    return np.stack(
        [coverage(shape, radius, (radius + dx, radius + dy), canvas=width) for dy in _PHASES for dx in _PHASES]
    ).astype(np.float64)


def _fit_shape(pixels_NHWC: np.ndarray, scenes: list[Scene], templates_PKK: np.ndarray) -> CaptionFit:
    colour_N3 = np.array([RGB_OF_COLOUR[scene.colour] for scene in scenes]) / 255
    background_N3 = np.array([RGB_OF_COLOUR[scene.background] for scene in scenes]) / 255
    axis_N3 = colour_N3 - background_N3
    # Project each pixel on the line between the caption's two colours: 0 is background, 1 is shape.
    membership = np.einsum("nhwc,nc->nhw", pixels_NHWC - background_N3[:, None, None], axis_N3)
    membership = np.clip(membership / (axis_N3**2).sum(axis=1)[:, None, None], 0, 1)

    overlap_NPYX = torch.nn.functional.conv2d(
        torch.from_numpy(membership)[:, None], torch.from_numpy(templates_PKK)[:, None]
    ).numpy()
    energy_P = (templates_PKK**2).sum(axis=(1, 2))
    dice_NPYX = 2 * overlap_NPYX / ((membership**2).sum(axis=(1, 2))[:, None, None, None] + energy_P[:, None, None])
    best_N = dice_NPYX.reshape(len(scenes), -1).argmax(axis=1)
    phase_N, top_N, left_N = np.unravel_index(best_N, dice_NPYX.shape[1:])

    mask_NHW = np.zeros(membership.shape)
    width = templates_PKK.shape[-1]
    for index, (phase, top, left) in enumerate(zip(phase_N, top_N, left_N, strict=True)):
        mask_NHW[index, top : top + width, left : left + width] = templates_PKK[phase]
    target = mask_NHW[..., None] * colour_N3[:, None, None] + (1 - mask_NHW[..., None]) * background_N3[:, None, None]
    error_NHW = ((pixels_NHWC - target) ** 2).mean(axis=-1)
    colour_error = (_weighted_mean(error_NHW, mask_NHW) + _weighted_mean(error_NHW, 1 - mask_NHW)) / 2

    middle = (IMAGE_SIZE - (width - 1)) / 2
    x = left_N + np.array(_PHASES)[phase_N % len(_PHASES)] - middle
    y = top_N + np.array(_PHASES)[phase_N // len(_PHASES)] - middle
    return CaptionFit(dice_NPYX.reshape(len(scenes), -1).max(axis=1), colour_error, np.stack([x, y], axis=1))


def _weighted_mean(values_NHW: np.ndarray, weights_NHW: np.ndarray) -> np.ndarray:
    return (values_NHW * weights_NHW).sum(axis=(1, 2)) / weights_NHW.sum(axis=(1, 2))
