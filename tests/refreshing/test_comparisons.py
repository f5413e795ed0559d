"""The reward player's problem against values by hand and an independent fit."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from smpo_pipeline.calibration.logistic import Objective
from smpo_pipeline.refreshing.comparisons import Images, compare


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def everything(comparisons):
    return comparisons.weigh(np.ones(len(comparisons.pair_C), dtype=bool))


def toy(pairs=60, width=3, seed=0):
    """Human pairs and three samples of each prompt, two pairs a prompt, some ties."""
    stream = np.random.default_rng(seed)
    human = Images(stream.normal(size=(pairs, 2, width)), stream.normal(size=(pairs, 2)))
    label = (stream.random(pairs) < 0.6).astype(float)
    label[::7] = 0.5
    prompts = [f"prompt {number // 2}" for number in range(pairs)]
    samples = {
        prompt: Images(stream.normal(size=(3, width)) - 1, stream.normal(size=3))
        for prompt in set(prompts[: pairs - 4])
    }
    return human, label, prompts, samples


def plain_loss(v, human, label, prompts, samples, tau, adversarial):
    """L in plain float64, pair by pair."""
    total = 0.0
    for number, prompt in enumerate(prompts):
        scores = human.score[number] + human.phi[number] @ v
        margin = (scores[0] - scores[1]) / tau
        total -= label[number] * np.log(sigmoid(margin)) + (1 - label[number]) * np.log(sigmoid(-margin))
        if label[number] != 0.5 and prompt in samples:
            drawn = samples[prompt].score + samples[prompt].phi @ v
            golden = max(scores, key=lambda score: (score == scores[0]) == (label[number] > 0.5))
            total -= adversarial * np.mean(np.log(sigmoid((golden - drawn) / tau)))
    return total / len(prompts)


@pytest.mark.parametrize("adversarial", [0.0, 0.1, 2.0])
def test_the_loss_and_its_minimum(adversarial):
    human, label, prompts, samples = toy()
    comparisons = compare(human, label, prompts, samples, 0.7, adversarial)
    objective = Objective.of(comparisons.rows, everything(comparisons), 0.0)
    v = objective.unscaled(objective.minimise()).v_D
    spread = np.sqrt(np.average(comparisons.rows.x_ND**2, axis=0, weights=everything(comparisons)))
    for point in (np.zeros(3), np.array([0.3, -1.0, 2.0])):
        assert objective(point * spread)[0] == pytest.approx(
            plain_loss(point, human, label, prompts, samples, 0.7, adversarial), rel=1e-12
        )
    independent = minimize(
        plain_loss, np.zeros(3), (human, label, prompts, samples, 0.7, adversarial), method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 5000},
    ).x  # fmt: skip
    np.testing.assert_allclose(v, independent, atol=1e-4)


def test_without_adversarial_samples_change_nothing():
    human, label, prompts, samples = toy()
    with_samples, alone = (compare(human, label, prompts, each, 0.7, 0.0) for each in (samples, {}))
    fits = [Objective.of(each.rows, everything(each), 0.01) for each in (with_samples, alone)]
    one, other = (each.unscaled(each.minimise()).v_D for each in fits)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_gradient_by_hand():
    """One feature, one pair (image_1 preferred) and one sample: phi 1, 3 and 2, scores 0.5, 0 and 1, tau 2."""
    human = Images(np.array([[[1.0], [3.0]]]), np.array([[0.5, 0.0]]))
    samples = {"a": Images(np.array([[2.0]]), np.array([1.0]))}
    comparisons = compare(human, np.array([0.0]), ["a"], samples, 2.0, 0.1)
    objective = Objective.of(comparisons.rows, everything(comparisons), 0.0)
    spread = np.sqrt((1 * 1 + 0.1 * 0.25) / 1.1)  # x = -1 with weight 1, x = 1/2 with weight 0.1
    for v in (0.0, 0.8):
        human_margin, sample_margin = (0.0 - 0.5 + 2 * v) / 2, (0.0 - 1.0 + v) / 2
        expected = -(1 - sigmoid(human_margin)) * 1 - 0.1 * (1 - sigmoid(sample_margin)) * 0.5
        value, gradient = objective(np.array([v * spread]))
        assert gradient[0] * spread == pytest.approx(expected, rel=1e-12)
        assert value == pytest.approx(-np.log(sigmoid(human_margin)) - 0.1 * np.log(sigmoid(sample_margin)))


def test_copies_of_a_sample_are_one():
    human, label, prompts, samples = toy()
    one = {prompt: Images(each.phi[:1], each.score[:1]) for prompt, each in samples.items()}
    four = {prompt: Images(np.repeat(each.phi, 4, axis=0), np.repeat(each.score, 4)) for prompt, each in one.items()}
    fits = []
    for each in (one, four):
        comparisons = compare(human, label, prompts, each, 0.7, 0.5)
        objective = Objective.of(comparisons.rows, everything(comparisons), 0.01)
        fits.append(objective.unscaled(objective.minimise()).v_D)
    np.testing.assert_allclose(*fits, rtol=1e-6)


def test_ties_and_prompts_without_samples_have_their_own_term_only():
    human, _, _, samples = toy(pairs=8)
    human, drawn = Images(human.phi[:4], human.score[:4]), {"a": samples["prompt 0"]}
    comparisons = compare(human, np.array([1.0, 0.5, 0.0, 1.0]), ["a", "a", "b", "c"], drawn, 1, 1)
    assert comparisons.pair_C.tolist() == [0, 1, 2, 3, 0, 0, 0]
    assert comparisons.is_human.tolist() == [True] * 4 + [False] * 3
    np.testing.assert_allclose(everything(comparisons), [0.25] * 4 + [1 / 12] * 3)
    without_last = comparisons.weigh(comparisons.pair_C != 3)
    np.testing.assert_allclose(without_last, [1 / 3, 1 / 3, 1 / 3, 0, 1 / 9, 1 / 9, 1 / 9])
