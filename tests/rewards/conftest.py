from __future__ import annotations

import pytest

from tests.tiny import make_tiny_clip
from tests.tiny_rewards import make_tiny_aesthetic, make_tiny_hpsv2, make_tiny_image_reward

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
