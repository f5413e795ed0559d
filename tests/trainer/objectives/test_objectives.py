from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from smpo_common.errors import UserError
from smpo_trainer.objectives import Objective, find_objective, objectives
from smpo_trainer.objectives.base import PairBatch, implicit_margin, smoothed_label
from smpo_trainer.objectives.capo import capo_loss
from smpo_trainer.objectives.dmpo import dmpo_loss
from smpo_trainer.objectives.dpo import dpo_loss
from smpo_trainer.objectives.ipo import ipo_loss
from smpo_trainer.objectives.mapo import mapo_loss, mapo_score
from smpo_trainer.objectives.smpo import smpo_loss
from tests.trainer.objectives.plain import BETA, GAMMA, PLAIN

LN2 = math.log(2)
NAMES = sorted(PLAIN)


def make(name: str, beta: float = BETA, gamma: float = GAMMA, **options: object) -> Objective:
    kind = find_objective(name)
    return kind(kind.Options.parse(name, {k: str(v) for k, v in options.items()}, beta=beta, gamma=gamma))


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(**changes: torch.Tensor) -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    values = {
        "error_B2": torch.rand(6, 2, generator=generator, dtype=torch.float64),
        "ref_error_B2": torch.rand(6, 2, generator=generator, dtype=torch.float64),
        "preference_B": float64(0.9, 0.2, 0.6, 0.55, 0.45, 0.1),
        "label_B": float64(1, 0, 1, 0, 1, 0),
        "timestep_B": torch.arange(6),
    }
    return PairBatch(**{**values, **changes})


def batch_of_margins(margin_B: torch.Tensor, label_B: torch.Tensor) -> PairBatch:
    """Pairs with these implicit reward margins at beta ``BETA``: -(beta/2) error_0 = h, all other errors 0."""
    zero_B = torch.zeros_like(margin_B)
    error_B2 = torch.stack([margin_B / (-BETA / 2), zero_B], dim=1)
    return PairBatch(error_B2, torch.zeros_like(error_B2), zero_B, label_B, zero_B)


def swap(pairs: PairBatch) -> PairBatch:
    return PairBatch(
        pairs.error_B2.flip(1), pairs.ref_error_B2.flip(1), 1 - pairs.preference_B, 1 - pairs.label_B, pairs.timestep_B
    )


def test_objectives_are_found_automatically() -> None:
    assert sorted(objectives()) == NAMES
    with pytest.raises(
        UserError, match="--objective nonsense is not known; known: capo, dmpo, dpo, ipo, linear-dpo, mapo"
    ):
        find_objective("nonsense")


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_plain_version(name: str) -> None:
    error = batch().error_B2.clone().requires_grad_(True)
    pairs = batch(error_B2=error)
    objective = make(name)
    loss, _ = objective(pairs)
    loss.sum().backward()

    plain_error = batch().error_B2.clone().requires_grad_(True)
    plain = []
    for b in range(6):
        is_first = pairs.preference_B[b] > 0.5 if objective.uses_rewards else pairs.label_B[b] > 0.5
        w, loser = (0, 1) if is_first else (1, 0)
        p = float(pairs.preference_B[b])
        reference = pairs.ref_error_B2[b]
        plain.append(
            PLAIN[name](
                plain_error[b, w], plain_error[b, loser], reference[w], reference[loser], p if is_first else 1 - p
            )
        )
    torch.stack(plain).sum().backward()
    torch.testing.assert_close(loss, torch.stack(plain), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(error.grad, plain_error.grad, rtol=1e-9, atol=1e-12)


# The weight of linear-dpo is a constant to the gradient, but not to the loss.
@pytest.mark.parametrize("name", sorted({*NAMES} - {"linear-dpo"}))
def test_gradient_by_finite_differences(name: str) -> None:
    objective, pairs = make(name), batch()

    def loss(error: torch.Tensor) -> torch.Tensor:
        return objective(batch(error_B2=error, ref_error_B2=pairs.ref_error_B2))[0]

    assert torch.autograd.gradcheck(loss, pairs.error_B2.clone().requires_grad_(True))


def test_smpo_by_hand() -> None:
    # beta 2000: d_theta = 0.001, d_ref = 0.0015, so h = -1000 * -0.0005 = 0.5; gamma (2p - 1) = 10 * 0.4 = 4
    error = torch.tensor([[0.501, 0.5]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.4015, 0.4]], dtype=torch.float64)
    margin = implicit_margin(error, reference, 2000.0)
    assert margin.item() == pytest.approx(0.5, abs=1e-10)
    loss = smpo_loss(margin, float64(0.7), 10.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-10)
    loss.sum().backward()
    slope = -4 * (1 / (1 + math.exp(2))) * -1000  # dloss/dh * dh/derror_0
    assert error.grad is not None
    np.testing.assert_allclose(error.grad.numpy(), [[slope, -slope]], rtol=1e-9)


def test_dpo_by_hand() -> None:
    margin = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(margin, float64(1, 0))
    np.testing.assert_allclose(loss.tolist(), [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))], rtol=1e-12)
    loss.sum().backward()
    assert margin.grad is not None
    np.testing.assert_allclose(margin.grad.tolist(), [-1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))], rtol=1e-12)


def test_dpo_with_smoothing_by_hand() -> None:
    # 0.9 log(1 + e^-1) + 0.1 log(1 + e^1)
    wanted = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    assert dpo_loss(float64(1), float64(1), 0.1).item() == pytest.approx(wanted, rel=1e-12)
    assert dpo_loss(float64(-1), float64(0), 0.1).item() == pytest.approx(wanted, rel=1e-12)


def test_smoothed_dpo_has_its_minimum_at_the_log_odds_of_the_label() -> None:
    margin = float64(math.log(9)).requires_grad_(True)
    dpo_loss(margin, float64(1), 0.1).backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(0, abs=1e-12)


def test_a_tie_pulls_the_margin_to_0() -> None:
    margin = float64(-2, 0, 2).requires_grad_(True)
    loss = dpo_loss(margin, float64(0.5, 0.5, 0.5), 0.1)
    assert loss[1].item() == pytest.approx(LN2, rel=1e-12)
    loss.sum().backward()
    assert margin.grad is not None
    np.testing.assert_allclose(margin.grad.tolist(), [0.5 - 1 / (1 + math.exp(-2)), 0, 1 / (1 + math.exp(-2)) - 0.5])


def test_ipo_by_hand() -> None:
    # (0.3 - 0.5)^2, and for the other label (-0.3 - 0.5)^2
    np.testing.assert_allclose(ipo_loss(float64(0.3, 0.3), float64(1, 0)).tolist(), [0.04, 0.64], rtol=1e-12)


def test_capo_by_hand() -> None:
    # p = 0.7: (0.4 - 0.1)^2; p = 1/2: the margin itself, squared
    np.testing.assert_allclose(capo_loss(float64(0.1, 0.1), float64(0.7, 0.5)).tolist(), [0.09, 0.01], rtol=1e-12)


def test_dmpo_by_hand() -> None:
    # model: (3/4, 1/4), label: (0.9, 0.1)
    wanted = 0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1)
    assert dmpo_loss(float64(math.log(3)), float64(1), 0.1).item() == pytest.approx(wanted, rel=1e-12)
    # the model's preference equals the label's: no divergence
    assert dmpo_loss(float64(-math.log(9)), float64(0), 0.1).item() == pytest.approx(0, abs=1e-15)


def test_dmpo_stays_finite_far_from_the_label() -> None:
    margin = float64(-800, 800).requires_grad_(True)
    loss = dmpo_loss(margin, float64(1, 1), 1e-3)
    loss.sum().backward()
    np.testing.assert_allclose(loss.tolist(), [-math.log(1e-3), -math.log(1 - 1e-3)], rtol=1e-12)
    assert margin.grad is not None
    assert margin.grad.isfinite().all()


def test_dmpo_assumes_one_wrong_label_in_a_hundred() -> None:
    # At the reference the slope is -logit(0.99) / 4; the least loss is at the label's own log-odds, ln 99.
    margin = float64(0, math.log(99)).requires_grad_(True)
    loss = make("dmpo").loss(batch_of_margins(margin, float64(1, 1)))
    (slope,) = torch.autograd.grad(loss.sum(), margin)
    np.testing.assert_allclose(slope.tolist(), [-1.148780, 0], atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapo_score_near_0(dtype: torch.dtype) -> None:
    """phi = 1 - x/2 + x^2/12 - ..., its slope -1/2 + x/6 - ..., with x = e/2; far away both vanish."""
    error = torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 0.03, 1e4], dtype=dtype, requires_grad=True)
    score = mapo_score(error, 0.5)
    (slope,) = torch.autograd.grad(score.sum(), error)
    x = error.detach().double().numpy()[:-1] / 2
    exact = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    np.testing.assert_allclose(score.tolist(), [*(1 - x / 2 + x**2 / 12 - x**4 / 720), 0], rtol=1e-6)
    np.testing.assert_allclose(slope.tolist(), [*(-1 / 4 + x / 12 - x**3 / 360), 0], rtol=exact)


def test_mapo_by_hand() -> None:
    error = torch.tensor([[0.2, 0.4]], dtype=torch.float64)
    score = [0.1 / (math.exp(0.1) - 1), 0.2 / (math.exp(0.2) - 1)]
    np.testing.assert_allclose(mapo_score(error, 0.5)[0].tolist(), score, rtol=1e-12)
    inner = 10 * (score[0] - score[1])
    losses = [
        mapo_loss(error, float64(label), margin_weight=0.3, scale=0.5, num_train_timesteps=10).item()
        for label in (1, 0)
    ]
    wanted = [0.2 + 0.3 * math.log(1 + math.exp(-inner)), 0.4 + 0.3 * math.log(1 + math.exp(inner))]
    np.testing.assert_allclose(losses, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("smpo", LN2), ("dpo", LN2), ("npo", LN2), ("ipo", 0.25), ("dmpo", -math.log(2) - math.log(0.01 * 0.99) / 2)],
)
def test_reference_as_model(name: str, wanted: float) -> None:
    same = torch.rand(6, 2, dtype=torch.float64)
    loss, metrics = make(name)(batch(error_B2=same, ref_error_B2=same.clone()))
    torch.testing.assert_close(loss, torch.full_like(loss, wanted), rtol=1e-12, atol=0)
    assert metrics["rewards/margins"].abs().max() == 0


def test_reference_as_model_gives_capo_the_squared_reward_difference() -> None:
    same = torch.rand(6, 2, dtype=torch.float64)
    loss, _ = make("capo")(batch(error_B2=same, ref_error_B2=same.clone()))
    torch.testing.assert_close(loss, (2 * batch().preference_B - 1) ** 2)


def test_selfnpo_needs_neither_beta_nor_preference() -> None:
    assert find_objective("selfnpo").resolve_beta(None, "a model of next year") == 1
    assert find_objective("mapo").resolve_beta(None, "a model of next year") == 2000
    _, metrics = make("selfnpo")(batch())
    assert all(values.isnan().all() for values in metrics.values())


@pytest.mark.parametrize("name", ["mapo", "sft"])
def test_reference_free_objectives_do_not_see_the_reference(name: str) -> None:
    objective = make(name)
    assert not objective.uses_reference
    plain, moved = objective(batch()), objective(batch(ref_error_B2=batch().ref_error_B2 + 1))
    torch.testing.assert_close(plain[0], moved[0], rtol=0, atol=0)
    # ... but the metrics do
    torch.testing.assert_close(moved[1]["rewards/chosen"], plain[1]["rewards/chosen"] + BETA / 2)


def test_even_preference_has_no_gradient_in_smpo() -> None:
    error = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    pairs = batch(error_B2=error, preference_B=torch.full((6,), 0.5, dtype=torch.float64))
    loss, metrics = make("smpo")(pairs)
    torch.testing.assert_close(loss, torch.full_like(loss, LN2))
    loss.mean().backward()
    assert error.grad is not None
    assert error.grad.abs().max() == 0
    assert metrics["rewards/margins"].isnan().all()


def test_even_preference_pulls_capo_to_the_reference() -> None:
    pairs = batch(preference_B=torch.full((6,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(make("capo")(pairs)[0], implicit_margin(pairs.error_B2, pairs.ref_error_B2, BETA) ** 2)


def test_smpo_at_full_strength_is_dpo() -> None:
    # p = 1 and p = 0 with gamma 1: gamma (2p - 1) is the sign of label - 1/2
    pairs = batch(preference_B=batch().label_B)
    torch.testing.assert_close(make("smpo", gamma=1)(pairs)[0], make("dpo")(pairs)[0], rtol=1e-12, atol=0)


def test_npo_is_dpo_with_exchanged_labels_and_metrics() -> None:
    ours, metrics = make("npo", label_smoothing=0.1)(batch())
    theirs, wanted = make("dpo", label_smoothing=0.1)(batch(label_B=1 - batch().label_B))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for name, values in wanted.items():
        torch.testing.assert_close(metrics[name], values, rtol=0, atol=0)


def test_capo_with_a_certain_preference_is_ipo_of_twice_its_scale() -> None:
    # (1 - h)^2 = 4 (h/2 - 1/2)^2
    pairs = batch(preference_B=batch().label_B)
    torch.testing.assert_close(make("capo", beta=2 * BETA)(pairs)[0], 4 * make("ipo")(pairs)[0])


def test_dmpo_and_smoothed_dpo_have_the_same_minimum() -> None:
    target = float64(0.2, 0.8)
    margin = (target / (1 - target)).log().requires_grad_(True)
    label = float64(0, 1)
    for loss in (dpo_loss(margin, label, 0.2), dmpo_loss(margin, label, 0.2)):
        (gradient,) = torch.autograd.grad(loss.sum(), margin)
        assert gradient.abs().max() < 1e-15


def test_mapo_without_a_margin_is_sft() -> None:
    torch.testing.assert_close(make("mapo", margin_weight=0)(batch())[0], make("sft")(batch())[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_swapping_images_changes_nothing(name: str) -> None:
    loss, metrics = make(name)(batch())
    swapped_loss, swapped_metrics = make(name)(swap(batch()))
    torch.testing.assert_close(loss, swapped_loss, rtol=1e-12, atol=1e-12)
    for metric, values in metrics.items():
        torch.testing.assert_close(values, swapped_metrics[metric], rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_is_independent_of_its_batch(name: str) -> None:
    pairs = batch()
    loss, _ = make(name)(pairs)
    for b in range(6):
        one = PairBatch(*(None if values is None else values[b : b + 1] for values in vars(pairs).values()))
        assert make(name)(one)[0].item() == pytest.approx(loss[b].item(), rel=1e-14)


def test_reward_metrics_by_hand() -> None:
    pairs = batch(
        error_B2=torch.tensor([[0.4, 0.6], [0.4, 0.6]], dtype=torch.float64),
        ref_error_B2=torch.full((2, 2), 0.5, dtype=torch.float64),
        preference_B=float64(0.9, 0.2),
    )
    _, metrics = make("smpo")(pairs)
    # rewards are -10 (error - 0.5): +1 for image_0, -1 for image_1
    np.testing.assert_allclose(metrics["rewards/chosen"].tolist(), [1, -1])
    np.testing.assert_allclose(metrics["rewards/rejected"].tolist(), [-1, 1])
    np.testing.assert_allclose(metrics["rewards/margins"].tolist(), [2, -2])
    assert metrics["rewards/accuracies"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "sd15", "sdxl"),
    # Diffusion-DPO's and SmPO's; NPO's 500 on SD 1.5 without the 1/2 of our margin; DMPO's only public implementation.
    [("smpo", 2000, 5000), ("dpo", 2000, 5000), ("npo", 1000, 2000), ("dmpo", 2000, 6000)],
)
def test_default_beta_is_the_published_one(name: str, sd15: float, sdxl: float) -> None:
    kind = find_objective(name)
    assert [kind.resolve_beta(None, family) for family in ("sd15", "sd2", "sdxl")] == [sd15, sd15, sdxl]
    assert kind.resolve_beta(7.0, "sdxl") == 7
    with pytest.raises(UserError, match=f"--objective {name}: no beta is published for flux.*--beta"):
        kind.resolve_beta(None, "flux")


@pytest.mark.parametrize("name", NAMES)
def test_usable_pairs(name: str) -> None:
    nan = math.nan
    p, label = np.array([0.5, nan, 0.7, 0.2]), np.array([1.0, 0.0, 0.5, nan])
    wanted = [True, False, True, True] if name in ("smpo", "capo") else [True, True, False, False]
    wanted = [True] * 4 if name == "selfnpo" else wanted
    assert make(name).usable(p, label).tolist() == wanted
    if name in ("dpo", "npo"):
        assert make(name, ties="keep").usable(p, label).tolist() == [True, True, True, False]


def test_smoothed_labels() -> None:
    np.testing.assert_allclose(smoothed_label(float64(1, 0, 0.5), 0.1).tolist(), [0.9, 0.1, 0.5], rtol=1e-12)
