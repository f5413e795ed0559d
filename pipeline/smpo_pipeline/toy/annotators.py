"""Simulated annotators with different tastes, who choose at random more often the closer two pictures are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smpo_pipeline.toy.caption_fit import fit_captions
from smpo_pipeline.toy.world import IMAGE_SIZE
from smpo_schemas.labels import TIE

TIE_MARGIN = 0.06
"""An annotator whose P(first preferred) is this close to 0.5 calls it a tie."""


@dataclass(frozen=True, slots=True)
class Annotator:
    """One person's weights of a picture's qualities, in log-odds per unit of :class:`Qualities`."""

    name: str
    match: float
    """For the caption's shape and size."""
    colour: float
    """For the caption's colours."""
    sharpness: float
    """For crisp edges."""
    placement: float
    """For a shape in the middle."""


ANNOTATORS: tuple[Annotator, ...] = (
    Annotator("reader", match=8.0, colour=5.0, sharpness=0.3, placement=0.0),
    Annotator("painter", match=3.0, colour=9.0, sharpness=0.3, placement=0.3),
    Annotator("engraver", match=4.0, colour=3.0, sharpness=8.0, placement=0.3),
    Annotator("curator", match=4.0, colour=3.0, sharpness=0.5, placement=4.0),
    Annotator("passer-by", match=2.0, colour=2.0, sharpness=0.5, placement=0.5),
)
"""``user_id`` in the pairs indexes this tuple. The last annotator chooses almost at random: all weights are small."""


@dataclass(frozen=True, slots=True)
class Qualities:
    """Qualities of N pictures with their captions; every array is float64 [N]."""

    match: np.ndarray
    """From 0 (no such shape) to 1."""
    colour: np.ndarray
    """Minus the root mean squared RGB error; 0 is perfect."""
    sharpness: np.ndarray
    """Strongest edges relative to the picture's contrast: about 0.3 (blurred) to 1 (crisp)."""
    placement: np.ndarray
    """1 in the middle, 0 at the edge of the picture."""


def qualities(images: Sequence[np.ndarray], captions: Sequence[str]) -> Qualities:
    """Measure the qualities that annotators judge by.

    Args:
        images: N pictures, uint8 [32, 32, 3], RGB.
        captions: N captions of the world.

    Raises:
        ValueError: as :func:`fit_captions`.
    """
    fit = fit_captions(images, captions)
    grey = np.stack(images).astype(np.float64).mean(axis=-1)
    steepness = np.maximum(abs(np.diff(grey, axis=1))[:, :, 1:], abs(np.diff(grey, axis=2))[:, 1:, :])
    contrast = np.quantile(grey, 0.99, axis=(1, 2)) - np.quantile(grey, 0.01, axis=(1, 2))
    return Qualities(
        match=fit.dice,
        colour=-np.sqrt(fit.colour_error),
        sharpness=np.clip(np.quantile(steepness, 0.98, axis=(1, 2)) / np.maximum(contrast, 16.0), 0, 1),
        placement=1 - np.linalg.norm(fit.offset, axis=1) / (IMAGE_SIZE / 2),
    )


def utility(annotator: Annotator, pictures: Qualities) -> np.ndarray:
    """Compute how much an annotator likes each picture, in log-odds: float64 [N]."""
    return (
        annotator.match * pictures.match
        + annotator.colour * pictures.colour
        + annotator.sharpness * pictures.sharpness
        + annotator.placement * pictures.placement
    )


def expected_label(
    images_0: Sequence[np.ndarray], images_1: Sequence[np.ndarray], captions: Sequence[str]
) -> np.ndarray:
    """Compute the expected label of each pair, over annotators and chance.

    Args:
        images_0: N pictures, uint8 [32, 32, 3], RGB.
        images_1: the other N.
        captions: N captions of the world.

    Returns:
        float64 [N], in (0, 1): P(the first is preferred); a tie counts half.

    Raises:
        ValueError: as :func:`fit_captions`.
    """
    first, second = qualities(images_0, captions), qualities(images_1, captions)
    probabilities = [_prefers_first(utility(person, first), utility(person, second)) for person in ANNOTATORS]
    return np.mean([np.where(_is_tie(p), TIE, p) for p in probabilities], axis=0)


def _prefers_first(utility_0: np.ndarray, utility_1: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(utility_1 - utility_0))


def _is_tie(probability: np.ndarray) -> np.ndarray:
    return abs(probability - TIE) < TIE_MARGIN


def choose(utility_0: np.ndarray, utility_1: np.ndarray, mood: np.ndarray) -> np.ndarray:
    """Draw Bradley-Terry choices between two pictures; nearly equal utilities give a tie.

    Args:
        utility_0: float64 [N], of the first picture of each pair, in log-odds.
        utility_1: likewise of the second.
        mood: float64 [N], uniform in [0, 1): the random number of each choice.

    Returns:
        float64 [N]: 1 (the first is preferred), 0 (the second) or TIE.
    """
    probability = _prefers_first(utility_0, utility_1)
    return np.where(_is_tie(probability), TIE, (mood < probability).astype(np.float64))
