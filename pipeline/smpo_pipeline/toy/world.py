"""The toy world's scenes (one flat shape on a plain background), their captions and their pictures."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

IMAGE_SIZE = 32
WORLD_SEED = 20250602
"""Draws the held-out captions, which are the same in every world, whatever the seed of its pairs."""

HELD_OUT_CAPTIONS = 64
"""Captions in each of the two held-out splits."""

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

RADIUS_OF_SIZE: dict[str, float] = {"small": 5.0, "large": 10.0}
"""Half the width of a shape, in pixels."""

SHAPES = ("circle", "square", "triangle", "cross")

RGB_OF_COLOUR: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 60),
    "purple": (160, 40, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}

_SUBPIXELS = 4
_MARGIN = 1.0  # pixels between a shape and the border


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a caption, which a picture must show; ``colour`` and ``background`` differ."""

    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        """The scene's only caption, for example "a small red circle on a blue background"."""
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    @property
    def radius(self) -> float:
        """Half the width of the shape, in pixels."""
        return RADIUS_OF_SIZE[self.size]


def all_scenes() -> list[Scene]:
    """List every scene of the world, in a fixed order."""
    return [
        Scene(size, colour, shape, background)
        for size, colour, shape, background in itertools.product(RADIUS_OF_SIZE, RGB_OF_COLOUR, SHAPES, RGB_OF_COLOUR)
        if colour != background
    ]


_SCENE_OF_CAPTION: dict[str, Scene] = {scene.caption: scene for scene in all_scenes()}


def scene_of(caption: str) -> Scene:
    """Parse a caption.

    Raises:
        ValueError: the world has no such caption.
    """
    try:
        return _SCENE_OF_CAPTION[caption]
    except KeyError:
        example = all_scenes()[0].caption
        raise ValueError(f"not a caption of the toy world: {caption!r} (an example is {example!r})") from None


def all_captions() -> list[str]:
    """List the captions of :func:`all_scenes`, in the same order."""
    return list(_SCENE_OF_CAPTION)


def captions_of(split: Split) -> list[str]:
    """List the captions of one split, in the world's order; the splits are disjoint and cover all captions.

    The base model, the reward models and the pairs use ``train``. Choose settings on ``validation`` and report numbers
    on ``test``.
    """
    captions = all_captions()
    order = np.random.default_rng(WORLD_SEED).permutation(len(captions))
    held_out = {"validation": order[:HELD_OUT_CAPTIONS], "test": order[HELD_OUT_CAPTIONS : 2 * HELD_OUT_CAPTIONS]}
    indices = held_out.get(split, order[2 * HELD_OUT_CAPTIONS :])
    return [captions[index] for index in sorted(indices)]


def words() -> list[str]:
    """List every word that a caption can contain, sorted."""
    return sorted({word for caption in all_captions() for word in caption.split()})


def random_centre(scene: Scene, rng: np.random.Generator) -> tuple[float, float]:
    """Draw a centre (x, y), in pixels, such that the whole shape is inside the picture."""
    reach = scene.radius + _MARGIN
    x, y = rng.uniform(reach, IMAGE_SIZE - reach, size=2)
    return float(x), float(y)


def coverage(shape: str, radius: float, centre: tuple[float, float], canvas: int = IMAGE_SIZE) -> np.ndarray:
    """Compute the share of each pixel that a shape covers.

    Args:
        shape: one of :data:`SHAPES`.
        radius: half the shape's width, in pixels.
        centre: (x, y) in pixels from the picture's top left corner.
        canvas: height and width of the picture, in pixels.

    Returns:
        float32 [canvas, canvas], from 0 (outside) to 1 (inside).
    """
    ticks = (np.arange(canvas * _SUBPIXELS) + 0.5) / _SUBPIXELS
    x = (ticks[None, :] - centre[0]) / radius
    y = (ticks[:, None] - centre[1]) / radius
    inside = _inside(shape, x, y)
    blocks = inside.reshape(canvas, _SUBPIXELS, canvas, _SUBPIXELS)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are in a shape of half-width 1 around the origin; y points down."""
    box = (abs(x) <= 1) & (abs(y) <= 1)
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "square":
            return box
        case "triangle":
            return box & (abs(x) <= (y + 1) / 2)
        case "cross":
            arm = 0.34
            return box & ((abs(x) <= arm) | (abs(y) <= arm))
        case _:
            raise ValueError(f"unknown shape: {shape!r} (known: {', '.join(SHAPES)})")


def render(scene: Scene, centre: tuple[float, float] | None = None) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: the scene.
        centre: (x, y) of the shape in pixels; None: the middle of the picture.

    Returns:
        uint8 [32, 32, 3], RGB, antialiased.
    """
    middle = IMAGE_SIZE / 2
    mask = coverage(scene.shape, scene.radius, centre or (middle, middle))[..., None]
    colour = np.array(RGB_OF_COLOUR[scene.colour], dtype=np.float32)
    background = np.array(RGB_OF_COLOUR[scene.background], dtype=np.float32)
    return np.rint(mask * colour + (1 - mask) * background).astype(np.uint8)
