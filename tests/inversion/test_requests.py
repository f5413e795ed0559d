"""Which trajectories are made together."""

from __future__ import annotations

from smpo_pipeline.inversion.requests import batches_of_one_size, trajectory_requests, with_most_pixels
from tests.inversion.helpers import make_pair


def test_few_pairs_are_inverted_again_with_other_draws():
    pairs = [make_pair(0), make_pair(1)]
    requests = trajectory_requests(pairs, first_trajectory=3)
    assert [(pair.pair_id, number) for pair, number in (next(requests) for _ in range(5))] == [
        ("pair-0", 3), ("pair-1", 3), ("pair-0", 4), ("pair-1", 4), ("pair-0", 5)
    ]  # fmt: skip


SHAPES = [(32, 32), (24, 40), (32, 32), (32, 32), (40, 24), (24, 40), (32, 32)]
MIXED = [make_pair(number, shape=shape) for number, shape in enumerate(SHAPES)]


def test_batches_are_of_one_size_and_hold_every_request_once():
    requests = [(pair, 0) for pair in MIXED]
    assert list(batches_of_one_size(requests, lambda: 3)) == [[0, 2, 3], [6], [1, 5], [4]]
    assert list(batches_of_one_size(requests[:1] * 5, iter([3, 1, 1, 1]).__next__)) == [[0, 1, 2], [3], [4]]


def test_the_size_is_tried_with_the_largest_images():
    assert {pair.pixels_2HW3.shape for pair in with_most_pixels(MIXED, 32)} == {(2, 32, 32, 3)}
    for pair, tried in zip(MIXED, with_most_pixels(MIXED, 32), strict=True):
        assert (pair.pair_id, pair.prompt) == (tried.pair_id, tried.prompt)
