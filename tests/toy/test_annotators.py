"""Annotators agree where one picture is clearly better, and disagree where two are close."""

from __future__ import annotations

import dataclasses

import numpy as np

from smpo_pipeline.toy.annotators import ANNOTATORS, choose, expected_label, qualities, utility
from smpo_pipeline.toy.world import Scene, render

SCENE = Scene("large", "red", "circle", "white")
NUM_DRAWS = 2000


def choices(image_0: np.ndarray, image_1: np.ndarray) -> np.ndarray:
    """Draw each annotator's label for each mood: [A, NUM_DRAWS]."""
    seen = qualities([image_0, image_1], [SCENE.caption] * 2)
    mood = np.random.default_rng(0).random(NUM_DRAWS)
    likes = [utility(person, seen) for person in ANNOTATORS]
    return np.stack([choose(np.full(NUM_DRAWS, a), np.full(NUM_DRAWS, b), mood) for a, b in likes])


def test_they_agree_on_a_clear_pair() -> None:
    wrong = render(dataclasses.replace(SCENE, size="small", colour="green", background="black"))
    said = choices(render(SCENE), wrong)
    assert said[:-1].mean(axis=1).min() > 0.95
    assert said[-1].mean() > 0.75, "even the one who hardly looks"


def test_they_disagree_on_a_close_pair() -> None:
    paler = (render(SCENE).astype(np.float64) * 0.95).astype(np.uint8)
    said = choices(render(SCENE, (12.0, 16.0)), paler)
    agreement = (said[:, None] == said[None, :]).mean()
    assert agreement < 0.9
    assert 0.1 < said.mean() < 0.9


def test_tastes_differ() -> None:
    off_centre, blurred = render(SCENE, (12.0, 12.0)), render(SCENE).astype(np.float64)
    for axis in (0, 1):
        blurred = (np.roll(blurred, 1, axis) + blurred + np.roll(blurred, -1, axis)) / 3
    seen = qualities([off_centre, blurred.astype(np.uint8)], [SCENE.caption] * 2)
    preferred = {person.name: int(np.argmax(utility(person, seen))) for person in ANNOTATORS}
    assert preferred["engraver"] == 0
    assert preferred["curator"] == 1


def test_equal_pictures_are_a_tie() -> None:
    assert (choices(render(SCENE), render(SCENE)) == 0.5).all()


def test_swapping_the_pictures_swaps_the_odds() -> None:
    mood = np.random.default_rng(1).random(100_000)
    one, two = np.full(len(mood), 0.8), np.full(len(mood), 0.0)
    assert abs(choose(one, two, mood).mean() + choose(two, one, mood).mean() - 1) < 0.01


def test_the_expected_label_is_the_mean_over_annotators_and_moods() -> None:
    paler = (render(SCENE).astype(np.float64) * 0.95).astype(np.uint8)
    others = [paler, render(SCENE), render(SCENE, (12.0, 12.0))]
    expected = expected_label([render(SCENE, (12.0, 16.0))] * 3, others, [SCENE.caption] * 3)
    said = [choices(render(SCENE, (12.0, 16.0)), other).mean() for other in others]
    # Standard error of a mean of 10,000 choices: at most 0.005.
    np.testing.assert_allclose(expected, said, atol=0.02)
    swapped = expected_label(others, [render(SCENE, (12.0, 16.0))] * 3, [SCENE.caption] * 3)
    np.testing.assert_allclose(expected + swapped, 1, rtol=1e-12)
