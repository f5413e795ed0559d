"""Votes as preference, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_schemas.preference import ScoredPairs
from smpo_schemas.preference.mixture import Mixture
from smpo_schemas.preference.votes import Votes, VotesMixture
from tests.schemas.helpers import statistics

NAN = float("nan")
LABELS = np.array([1.0, 0.75, 0.5, NAN, 0.0])
VOTES = np.array([NAN, 8.0, 2.0, 5.0, 1000.0])


def test_few_votes_are_drawn_to_one_half():
    p = Votes({}, {}, None, 2.0).probability(ScoredPairs({}, labels_P=LABELS, votes_P=VOTES))
    np.testing.assert_allclose(p, [2 / 3, 7 / 10, 1 / 2, NAN, 1 / 1002], rtol=1e-15)


def test_votes_are_drawn_to_the_mixtures_p_which_stands_for_missing_ones():
    scores = {"one": np.array([[0.2, 0.1]] * 5)}
    parts = {"one": 1.0}, {"one": statistics(scores["one"])}, {"one": 0.1}
    m = 1 / (1 + np.exp(-1.0))
    pairs = ScoredPairs(scores, labels_P=LABELS, votes_P=VOTES)
    np.testing.assert_allclose(Mixture(*parts).probability(pairs), m, rtol=1e-15)
    expected = [(1 + 3 * m) / 4, (6 + 3 * m) / 11, (1 + 3 * m) / 5, m, 3 * m / 1003]
    np.testing.assert_allclose(VotesMixture(*parts, 3.0).probability(pairs), expected, rtol=1e-14)


def test_pairs_without_labels_at_all_are_an_error():
    with pytest.raises(UserError, match="have no labels"):
        Votes({}, {}, None, 2.0).probability(ScoredPairs({}))
