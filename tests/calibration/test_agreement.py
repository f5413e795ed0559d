from __future__ import annotations

import numpy as np

from smpo_pipeline.calibration.agreement import Repeats, between_annotators, by_annotator
from tests.calibration.helpers import labelled

PROMPTS = ["x", "x", "x", "y", "x", "x"]
LABELS = [1.0, 0.0, 0.5, 1.0, None, 1.0]
PEOPLE = ["ann", "bob", "ann", "ann", "bob", None]
IMAGES = [("a", "b"), ("b", "a"), ("a", "b"), ("a", "b"), ("a", "b"), ("a", "c")]
SCORES = {"r": np.array([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [0.0, 1.0], [5.0, 0.0]])}


def test_the_same_pair_has_the_same_images_of_one_prompt_in_any_order(tmp_path):
    """Rows 0, 1 and 2 are one pair: ann prefers a, bob (images swapped) prefers a too, ann's second label is a tie."""
    found = between_annotators(labelled(tmp_path / "s", SCORES, LABELS, PROMPTS, PEOPLE, IMAGES))
    assert found.pairs == 1
    assert found.others == Repeats(alike=1, decided=1, with_tie=1)
    assert found.selves == Repeats(alike=0, decided=0, with_tie=1)


def test_without_image_hashes_pairs_are_matched_by_id(tmp_path):
    ids = ["p", "p", "q", "r", "p", "q"]
    found = between_annotators(labelled(tmp_path / "s", SCORES, LABELS, PROMPTS, PEOPLE, pair_ids=ids))
    assert found.pairs == 2
    assert found.others == Repeats(alike=0, decided=1, with_tie=1)
    assert found.selves == Repeats()


def test_agreement_by_annotator(tmp_path):
    data = labelled(tmp_path / "s", SCORES, LABELS, PROMPTS, PEOPLE, IMAGES)
    p = np.array([0.9, 0.9, 0.9, 0.1, np.nan, 0.5])
    # Ann's decided labels are rows 0 and 3, Bob's is row 1; row 5 has no name.
    assert by_annotator(data, p, 10) == {"ann": (1, 2), "bob": (0, 1)}
    assert by_annotator(data, p, 1) == {"ann": (1, 2)}
