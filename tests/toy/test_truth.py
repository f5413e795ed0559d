"""The true reward of pictures whose faults are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from smpo_pipeline.toy.caption_fit import fit_captions
from smpo_pipeline.toy.truth import COLOUR_TOLERANCE, true_reward
from smpo_pipeline.toy.world import IMAGE_SIZE, RGB_OF_COLOUR, Scene, all_scenes, random_centre, render

SCENE = Scene("large", "red", "square", "white")


def reward(image: np.ndarray, scene: Scene = SCENE) -> float:
    return float(true_reward([image], [scene.caption])[0])


def test_a_perfect_render_in_the_middle_earns_one() -> None:
    assert reward(render(SCENE)) == pytest.approx(1, abs=1e-3)


def test_every_scene_at_any_place_earns_nearly_one() -> None:
    rng = np.random.default_rng(1)
    scenes = all_scenes()
    images = [render(scene, random_centre(scene, rng)) for scene in scenes]
    rewards = true_reward(images, [scene.caption for scene in scenes])
    assert rewards.min() > 0.93
    assert rewards.max() <= 1


def test_the_place_does_not_matter() -> None:
    scene = dataclasses.replace(SCENE, size="small")
    places = [(8.0, 8.0), (8.0, 23.5), (20.25, 11.0), (16.0, 16.0)]
    assert [reward(render(scene, place), scene) for place in places] == pytest.approx([1] * 4, abs=1e-3)
    offset = fit_captions([render(scene, (20.25, 11.0))], [scene.caption]).offset[0]
    assert offset == pytest.approx([4.25, -5.0])


@pytest.mark.parametrize(
    ("fault", "most"),
    [
        ({"size": "small"}, 0.25),
        ({"colour": "green"}, 0.12),
        ({"background": "black"}, 0.05),
        ({"shape": "cross"}, 0.6),
    ],
)
def test_a_wrong_attribute_costs(fault: dict[str, str], most: float) -> None:
    assert reward(render(dataclasses.replace(SCENE, **fault))) < most


def test_an_empty_picture_earns_nothing() -> None:
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), RGB_OF_COLOUR["white"], dtype=np.uint8)
    assert reward(image) == 0


def test_a_hand_computed_case() -> None:
    """Shift red by 40 steps orthogonally to the line from white to red: the shape is right, its colour is off."""
    image = render(SCENE)
    image[(image == RGB_OF_COLOUR["red"]).all(axis=-1)] += np.array([0, 40, -40], dtype=np.int16).astype(np.uint8)
    colour_error = (40**2 + 40**2) / 3 / 255**2 / 2  # the background, half the weight, is right
    assert reward(image) == pytest.approx(np.exp(-colour_error / COLOUR_TOLERANCE), rel=1e-6)


def test_a_batch_equals_its_parts() -> None:
    rng = np.random.default_rng(2)
    captions = [scene.caption for scene in all_scenes()[::20]]
    images = [rng.integers(256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8) for _ in captions]
    singly = [true_reward([image], [caption])[0] for image, caption in zip(images, captions, strict=True)]
    np.testing.assert_allclose(true_reward(images, captions), singly, rtol=1e-12)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not a caption"):
        true_reward([render(SCENE)], ["a large red square"])
    with pytest.raises(ValueError, match="1 images but 0 captions"):
        true_reward([render(SCENE)], [])
    with pytest.raises(ValueError, match="uint8"):
        true_reward([render(SCENE).astype(np.float32)], [SCENE.caption])
