from __future__ import annotations

import pytest

from tests.tiny.rewards import make_tiny_aesthetic, make_tiny_hpsv2, make_tiny_image_reward
from tests.tiny.stable_diffusion import make_tiny_clip

MAKERS = {
    "pickscore": make_tiny_clip,
    "clipscore": make_tiny_clip,
    "hpsv2": make_tiny_hpsv2,
    "aesthetic": make_tiny_aesthetic,
    "imagereward": make_tiny_image_reward,
}


@pytest.fixture(scope="package")
def folders(tmp_path_factory):
    """A tiny model of each reward."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}
