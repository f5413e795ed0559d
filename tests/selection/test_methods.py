"""Which pairs each method selects: values by hand, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.selection.judges import JudgedImage, PairwiseJudge, find_judge, in_both_orders, judges
from smpo_pipeline.selection.judges.rewards import RewardsJudge
from smpo_pipeline.selection.methods import NoPairError, Rules, find_selection, pareto, selections
from smpo_pipeline.selection.methods.extremes import Extremes
from smpo_pipeline.selection.methods.pareto import Pareto, frontiers
from smpo_pipeline.selection.methods.ranking import Ranking
from smpo_schemas.reject_kinds import RejectKind
from tests.selection.helpers import candidates


def pairs(method, scores, seed=0, **changes) -> list[tuple[int, int]]:
    return [(each.chosen, each.rejected) for each in method.select(candidates(scores, seed, **changes))]


def reason(method, scores) -> RejectKind:
    with pytest.raises(NoPairError) as error:
        method.select(candidates(scores))
    return error.value.kind


def test_methods_and_judges_are_found_by_their_file():
    assert set(selections()) == {"extremes", "pareto", "ranking"}
    assert find_selection("pareto") is Pareto
    assert set(judges()) == {"rewards", "vlm"}
    assert find_judge("rewards") is RewardsJudge
    with pytest.raises(UserError, match="--by extreme: did you mean extremes.*MODULE:CLASS"):
        find_selection("extreme")
    with pytest.raises(UserError, match="not a subclass of .*Selection"):
        find_selection("tests.selection.helpers:Image")


def test_extremes_of_three_log_odds():
    (pair,) = Extremes(Rules()).select(candidates([[1.0], [2.0], [0.0]]))
    assert (pair.chosen, pair.rejected) == (1, 2)
    assert pair.gap == pytest.approx(0.61186, abs=5e-6)
    np.testing.assert_allclose(candidates([[2.0], [1.0], [0.0]]).rates_NK[:, 0], [0.80593, 0.5, 0.19407], atol=5e-6)


def test_extremes_mix_rewards_by_weight():
    scores = [[3.0, 0.0], [0.0, 3.0], [1.0, 1.0]]
    assert pairs(Extremes(Rules()), scores, weights=[0.9, 0.1]) == [(0, 1)]
    assert pairs(Extremes(Rules()), scores, weights=[0.1, 0.9]) == [(1, 0)]


def test_extremes_take_the_second_best_against_the_second_worst_while_there_is_a_gap():
    assert pairs(Extremes(Rules(pairs_per_prompt=9)), [[3], [0], [2], [1], [5]]) == [(4, 1), (0, 3)]
    assert pairs(Extremes(Rules(pairs_per_prompt=9)), [[3], [1], [1], [0]]) == [(0, 3)]
    assert pairs(Extremes(Rules(pairs_per_prompt=9, min_gap=0.3)), [[9], [0], [2], [1], [1]]) == [(0, 1)]


def test_extremes_order_equal_images_by_their_hashes():
    assert pairs(Extremes(Rules()), [[0], [2], [2], [0]]) == [(1, 0)]


@pytest.mark.parametrize("method", [Extremes, Pareto])
def test_no_pair_of_equal_or_single_images(method):
    assert reason(method(Rules()), [[1.0, 1.0], [1.0, 1.0]]) == RejectKind.ALL_EQUAL
    assert reason(method(Rules()), [[1.0, 1.0]]) == RejectKind.ONE_IMAGE


def test_gap_below_the_smallest():
    with pytest.raises(NoPairError) as error:
        Extremes(Rules(min_gap=0.7)).select(candidates([[2.0], [1.0], [0.0]]))
    assert error.value.kind == RejectKind.GAP_TOO_SMALL
    assert error.value.details == "at most 0.6119, --min-gap 0.7"
    assert reason(Pareto(Rules(min_gap=0.7)), [[2.0], [1.0], [0.0]]) == RejectKind.GAP_TOO_SMALL
    assert pairs(Pareto(Rules(min_gap=0.6)), [[2.0], [1.0], [0.0]]) == [(0, 2)]


def test_frontiers_by_hand():
    scores = [[3, 1], [2, 2], [1, 3], [0, 0], [2, 1]]
    upper, lower = frontiers(np.array(scores, dtype=float))
    assert upper.tolist() == [True, True, True, False, False]
    assert lower.tolist() == [False, False, False, True, False]
    assert sorted(pairs(Pareto(Rules(pairs_per_prompt=9)), scores)) == [(0, 3), (1, 3), (2, 3)]


def test_no_frontier_pair_where_none_dominates():
    assert reason(Pareto(Rules()), [[1, 2], [2, 1]]) == RejectKind.NO_FRONTIER_PAIR


def test_a_chain_has_one_frontier_pair():
    assert pairs(Pareto(Rules(pairs_per_prompt=9)), [[1, 1], [3, 3], [0, 0], [2, 2]]) == [(1, 2)]


def random_scores(seed: int) -> np.ndarray:
    """Some equal, so that dominance is not strict."""
    return np.random.default_rng(seed).integers(0, 5, (9, 3)).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_frontiers_against_brute_force_and_of_win_rates(monkeypatch, seed):
    monkeypatch.setattr(pareto, "_COMPARISONS_AT_ONCE", 60)  # two rows at once
    scores = random_scores(seed)

    def dominates(i, j):
        return all(scores[i] >= scores[j]) and any(scores[i] > scores[j])

    upper, lower = frontiers(scores)
    for i in range(9):
        assert upper[i] == (not any(dominates(j, i) for j in range(9)))
        assert lower[i] == (not any(dominates(i, j) for j in range(9)))
    of_rates = frontiers(candidates(scores).rates_NK.round(12))
    np.testing.assert_array_equal(of_rates, (upper, lower))


@pytest.mark.parametrize("seed", range(5))
def test_a_monotone_map_leaves_pareto_unchanged(seed):
    method = Pareto(Rules(pairs_per_prompt=3))
    scores = random_scores(seed)
    mapped = np.stack([np.exp(scores[:, 0]), scores[:, 1] ** 3 - 8, 10 * scores[:, 2]], axis=1)
    assert pairs(method, scores, seed=1) == pairs(method, mapped, seed=1)


def test_pareto_draws_different_pairs_by_its_stream():
    scores = [[3, 1], [2, 2], [1, 3], [0, 0], [-1, 1], [1, -1]]
    drawn = [pairs(Pareto(Rules(pairs_per_prompt=4)), scores, seed) for seed in range(20)]
    assert all(len(set(each)) == 4 for each in drawn)
    assert drawn[0] == pairs(Pareto(Rules(pairs_per_prompt=4)), scores, 0)
    assert {pair for each in drawn for pair in each} == {(i, j) for i in range(3) for j in range(3, 6)}


def test_only_dominated_images_are_rejected():
    scores = [[3, 0], [0, 3], [2, -1], [-1, 2]]  # 0 dominates 2, 1 dominates 3
    free = {pair for seed in range(20) for pair in pairs(Pareto(Rules(pairs_per_prompt=9)), scores, seed)}
    assert free == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert sorted(pairs(Pareto(Rules(pairs_per_prompt=9, dominated_only=True)), scores)) == [(0, 2), (1, 3)]


class Cyclic(PairwiseJudge):
    """00 beats 01, 01 beats 02, 02 beats 00."""

    name = "cyclic"
    needs_images = False

    def compare(self, first: JudgedImage, second: JudgedImage, _prompt: str) -> float:
        return 0.9 if (first.image_id, second.image_id) in {("00", "01"), ("01", "02"), ("02", "00")} else 0.1


class InOrder:
    """A stream that draws this order."""

    def __init__(self, *order: int) -> None:
        self.order = order

    def permutation(self, count: int) -> np.ndarray:
        assert count == len(self.order)
        return np.array(self.order)


@pytest.mark.parametrize(("order", "winner"), [((0, 1, 2), 2), ((1, 2, 0), 0)])
def test_a_cyclic_judge_prefers_the_last_to_come(order, winner):
    method = Ranking(Rules(judge=Cyclic({}, {})))
    proposal = next(method.propose(candidates([[0.0]] * 3, stream=InOrder(*order))))
    assert proposal.chosen == winner


def test_a_judge_that_contradicts_itself_gives_no_pair():
    """Order 0, 1, 2: 2 wins, 1 is the last of 0 and 1, but 1 beats 2."""
    with pytest.raises(NoPairError) as error:
        Ranking(Rules(judge=Cyclic({}, {}))).select(candidates([[0.0]] * 3, stream=InOrder(0, 1, 2)))
    assert error.value.kind == RejectKind.NO_CLEAR_ORDER


def by_scores() -> RewardsJudge:
    return RewardsJudge({"r0": 1.0}, {"r0": 1.0})


@pytest.mark.parametrize("seed", range(5))
def test_ranking_by_one_reward_is_the_best_against_the_worst(seed):
    scores = np.random.default_rng(seed).normal(size=(7, 1))
    (pair,) = Ranking(Rules(judge=by_scores())).select(candidates(scores, seed))
    assert (pair.chosen, pair.rejected) == (scores.argmax(), scores.argmin())
    assert pair.gap == pytest.approx(2 / (1 + math.exp(scores.min() - scores.max())) - 1)


def test_ranking_with_a_random_loser_and_further_pairs():
    scores = [[0.0], [1.0], [2.0], [3.0], [4.0]]
    method = Ranking(Rules(judge=by_scores(), loser="random"))
    drawn = {pair for seed in range(40) for pair in pairs(method, scores, seed)}
    assert drawn == {(4, 0), (4, 1), (4, 2), (4, 3)}
    assert pairs(method, scores, 3) == pairs(method, scores, 3)
    assert pairs(Ranking(Rules(judge=by_scores(), pairs_per_prompt=9)), scores) == [(4, 0), (3, 1)]


def test_ranking_of_equal_images_has_no_clear_order():
    assert reason(Ranking(Rules(judge=by_scores())), [[1.0], [1.0], [1.0]]) == RejectKind.NO_CLEAR_ORDER


def test_the_rewards_judge_is_the_mixture():
    judge = RewardsJudge({"r0": 0.25, "r1": 0.75}, {"r0": 0.5, "r1": 2.0})
    one, two = (JudgedImage(str(n), {"r0": r0, "r1": r1}) for n, (r0, r1) in enumerate([(1.0, 3.0), (0.0, 4.0)]))
    expected = 0.25 / (1 + math.exp(-2.0)) + 0.75 / (1 + math.exp(0.5))
    assert judge.compare(one, two, "") == pytest.approx(expected, rel=1e-14)
    assert in_both_orders(judge, one, two, "") == pytest.approx((expected, 0.5), rel=1e-14)


class Answers(PairwiseJudge):
    """Gives these answers in turn."""

    name = "answers"

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    def compare(self, _first: JudgedImage, _second: JudgedImage, _prompt: str):
        return self.answers.pop(0)


def test_a_bias_towards_one_position_is_measured_and_cancels():
    image = JudgedImage("", {})
    assert in_both_orders(Answers(0.7, 0.7), image, image, "") == (0.5, 0.7)
    assert in_both_orders(Answers(1.0, 0.5), image, image, "") == (0.75, 0.75)
    assert in_both_orders(Answers(0.2, 0.6), image, image, "") == pytest.approx((0.3, 0.4))


@pytest.mark.parametrize("answer", [1.5, -0.1, math.nan, None, "first"])
def test_an_answer_that_is_no_probability(answer):
    image = JudgedImage("", {})
    with pytest.raises(UserError, match="--judge answers: compare returned"):
        in_both_orders(Answers(0.5, answer), image, image, "")
