"""Which images the report shows side by side, and how they are embedded in it.

Shape suffixes: P prompts, I images a prompt.
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
"""Images up to this side are embedded losslessly and shown enlarged with hard pixels."""
_THUMBNAIL_SIDE = 384
_QUALITY = 85


@dataclass(frozen=True)
class Spot:
    """One image of a comparison: number of the prompt, number of the image."""

    prompt: int
    image: int


@dataclass(frozen=True)
class Selection:
    """The images to show of a model against the baseline under one reward; each prompt at most once in a list."""

    best: list[Spot]
    worst: list[Spot]


def select_extremes(difference_PI: np.ndarray) -> Selection:
    """The largest gains and the largest losses; a list is shorter where fewer prompts gain or lose at all."""
    gains, losses = _per_prompt(difference_PI), _per_prompt(-difference_PI)
    return Selection(best=gains[:_EXTREMES], worst=losses[:_EXTREMES])


def _per_prompt(difference_PI: np.ndarray) -> list[Spot]:
    """Each prompt's largest positive difference, the largest first."""
    image_P = difference_PI.argmax(axis=1)
    value_P = difference_PI.max(axis=1)
    return [Spot(int(p), int(image_P[p])) for p in np.argsort(-value_P, kind="stable") if value_P[p] > 0]


def select_random(num_prompts: int, images_per_prompt: int) -> list[Spot]:
    """Images drawn without regard to any score, each of another prompt; the same ones for the same numbers."""
    rng = np.random.default_rng(_SELECTION_SEED)
    prompts = rng.permutation(num_prompts)[:_RANDOM]
    return [Spot(int(prompt), int(rng.integers(images_per_prompt))) for prompt in prompts]


@dataclass(frozen=True)
class Shown:
    """One image in the report: the model's name, a data URI, its scores by reward, whether pixels are kept hard."""

    model: str
    uri: str
    scores: Mapping[str, float]
    hard_pixels: bool


def embed(path: Path) -> tuple[str, bool]:
    """The image as a data URI, and whether it is small enough to be shown with hard pixels."""
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
