"""Pictures and prompts that break scorers, and checks for every reward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from smpo_pipeline.images.decode import decode_image
from tests.pictures import all_kinds, picture

PROMPTS = [
    "a cat and a dog",
    "",
    "cat",
    "dog " * 500,
    "Ünïcode 東京 🐈 e\u0301",
    "A CAT &amp;amp; “dogs” don't\n\tun-do  3000 things ﬁ \uff11\uff12",
    "<|endoftext|> a [SEP] [ENC] cat",
    "x" * 10_000,
]


def odd_pictures() -> list[Image.Image]:
    """Make decoded images of all kinds, with sizes near those of models."""
    sizes = [(32, 32), (31, 33), (33, 32), (32, 17), (45, 32), (32, 47), (224, 225), (301, 200), (500, 7)]
    shapes = [picture(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    return [decode_image(data) for data in all_kinds().values()] + shapes + [Image.new("RGB", (50, 40))]


def batch() -> tuple[list[Image.Image], list[str]]:
    """Pair every odd picture with a prompt; every prompt occurs at least twice."""
    pictures = odd_pictures()
    return pictures, [PROMPTS[number % len(PROMPTS)] for number in range(len(pictures))]


def assert_independent(reward, every: int = 1, longest: int | None = None) -> None:
    """Assert that a score depends on its own image and prompt alone.

    Args:
        reward: to ask.
        every: of the pictures, each of so many; of three, each prompt is still among them.
        longest: prompts are cut after so many characters.
    """
    pictures, prompts = (each[::every] for each in batch())
    prompts = [prompt[:longest] for prompt in prompts]
    whole = reward.score(pictures, prompts)
    assert whole.dtype == np.float64
    assert whole.shape == (len(pictures),)
    assert np.ptp(whole) > 0.05, "scores that do not differ would pass any comparison"
    single = [reward.score([image], [prompt])[0] for image, prompt in zip(pictures, prompts, strict=True)]
    np.testing.assert_allclose(whole, single, atol=1e-5)
    np.testing.assert_allclose(whole[::-1], reward.score(pictures[::-1], prompts[::-1]), atol=1e-5)
    np.testing.assert_allclose(whole[3:8], reward.score(pictures[3:8], prompts[3:8]), atol=1e-5)
    # Several threads of a worker share a reward.
    with ThreadPoolExecutor(4) as threads:
        parts = threads.map(
            lambda at: reward.score(pictures[at : at + 4], prompts[at : at + 4]), range(0, len(whole), 4)
        )
        np.testing.assert_allclose(whole, np.concatenate(list(parts)), atol=1e-5)
