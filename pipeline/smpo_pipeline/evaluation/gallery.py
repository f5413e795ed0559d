"""Select the images that the report shows side by side, and embed them.

Shape suffixes: P prompts, I images per prompt.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

_EXTREMES = 6
_RANDOM = 12
_SELECTION_SEED = 0
_SMALL_SIDE = 128
"""Images up to this side are embedded losslessly and enlarged without smoothing."""
_THUMBNAIL_SIDE = 384
_QUALITY = 85


@dataclass(frozen=True)
class Spot:
    """One image of a comparison: the prompt's number and the image's number within it."""

    prompt: int
    image: int


@dataclass(frozen=True)
class Selection:
    """A model's largest gains and losses against the baseline under one reward; a list has a prompt at most once."""

    best: list[Spot]
    worst: list[Spot]


def select_extremes(difference_PI: np.ndarray) -> Selection:
    """Select the largest gains and losses; the lists are shorter if fewer prompts gain or lose."""
    gains, losses = _per_prompt(difference_PI), _per_prompt(-difference_PI)
    return Selection(best=gains[:_EXTREMES], worst=losses[:_EXTREMES])


def _per_prompt(difference_PI: np.ndarray) -> list[Spot]:
    """List each prompt's largest difference, if positive, in descending order."""
    image_P = difference_PI.argmax(axis=1)
    value_P = difference_PI.max(axis=1)
    return [Spot(int(p), int(image_P[p])) for p in np.argsort(-value_P, kind="stable") if value_P[p] > 0]


def select_random(num_prompts: int, images_per_prompt: int) -> list[Spot]:
    """Draw images of different prompts with a fixed seed, regardless of scores."""
    rng = np.random.default_rng(_SELECTION_SEED)
    prompts = rng.permutation(num_prompts)[:_RANDOM]
    return [Spot(int(prompt), int(rng.integers(images_per_prompt))) for prompt in prompts]


@dataclass(frozen=True)
class Shown:
    """One image in the report: the model's name, a data URI, scores by reward, whether to enlarge without smoothing."""

    model: str
    uri: str
    scores: Mapping[str, float]
    hard_pixels: bool


def embed(path: Path) -> tuple[str, bool]:
    """Encode an image as a data URI; also return whether it is small, to be enlarged without smoothing."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    buffer = io.BytesIO()
    small = max(image.size) <= _SMALL_SIDE
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        image.save(buffer, format="WEBP", quality=_QUALITY)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{'png' if small else 'webp'};base64,{content}", small
