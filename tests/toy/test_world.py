"""Scenes, captions, splits and pictures of the toy world."""

from __future__ import annotations

import numpy as np
import pytest

from smpo_pipeline.toy.world import (
    HELD_OUT_CAPTIONS,
    IMAGE_SIZE,
    SHAPES,
    SPLITS,
    Scene,
    all_captions,
    all_scenes,
    captions_of,
    coverage,
    random_centre,
    render,
    scene_of,
)


def test_captions_round_trip() -> None:
    assert [scene_of(caption) for caption in all_captions()] == all_scenes()
    assert Scene("small", "red", "circle", "blue").caption == "a small red circle on a blue background"


def test_a_foreign_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="not a caption of the toy world: 'a red car'"):
        scene_of("a red car")


def test_splits_are_disjoint_and_complete() -> None:
    splits = {split: captions_of(split) for split in SPLITS}
    assert len(splits["validation"]) == len(splits["test"]) == HELD_OUT_CAPTIONS >= 64
    together = [caption for captions in splits.values() for caption in captions]
    assert len(together) == len(set(together)) == len(all_captions()) >= 300
    assert set(together) == set(all_captions())


def test_every_attribute_is_seen_in_training() -> None:
    seen = {word for caption in captions_of("train") for word in caption.split()}
    assert seen == {word for caption in all_captions() for word in caption.split()}


@pytest.mark.parametrize("scene", all_scenes()[::17])
def test_a_render_shows_both_colours(scene: Scene) -> None:
    image = render(scene)
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    corner, middle = render(scene)[0, 0], render(scene)[IMAGE_SIZE // 2, IMAGE_SIZE // 2]
    other = Scene(scene.size, scene.background, scene.shape, scene.colour)
    assert (render(other)[0, 0] == middle).all()
    assert (corner != middle).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_antialiased_and_has_the_right_area(shape: str) -> None:
    radius = 8.0
    area = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 4 * 0.34 * 2 - 4 * 0.34**2}[shape]
    mask = coverage(shape, radius, (15.3, 16.1))
    assert mask.sum() == pytest.approx(area * radius**2, rel=0.03)
    assert ((mask > 0) & (mask < 1)).any()


def test_shapes_stay_inside_the_picture() -> None:
    rng = np.random.default_rng(0)
    for scene in all_scenes():
        mask = coverage(scene.shape, scene.radius, random_centre(scene, rng))
        assert mask[[0, -1]].sum() == mask[:, [0, -1]].sum() == 0
