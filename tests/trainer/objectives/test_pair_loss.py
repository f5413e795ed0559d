from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from smpo_trainer.objectives import find_objective
from smpo_trainer.objectives.base import PairBatch
from smpo_trainer.objectives.pair_loss import PairLoss, budget_excess
from smpo_trainer.objectives.timestep_weighting import TimestepWeighting
from tests.trainer.objectives.plain import BETA, PLAIN
from tests.trainer.objectives.test_objectives import batch, swap
from tests.trainer.objectives.test_timestep_weighting import schedule

ONES = torch.ones(6, dtype=torch.float64)


def make(name: str = "dpo", kind: str = "uniform", budget: float | None = None, budget_weight: float = 1.0) -> PairLoss:
    objective = find_objective(name)
    weighting = TimestepWeighting(kind, 5.0, 0.0)
    return PairLoss(
        objective(objective.Options.parse(name, {}, beta=BETA)), schedule("epsilon"), weighting, budget, budget_weight
    )


def pairs() -> PairBatch:
    return replace(batch(), timestep_B=torch.tensor([1, 50, 200, 500, 800, 999]))


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_without_further_terms_it_is_the_objective(name: str) -> None:
    loss, metrics = make(name)(pairs(), ONES)
    wanted, _ = make(name).objective(pairs())
    torch.testing.assert_close(loss, wanted, rtol=0, atol=0)
    assert "budget/excess" not in metrics


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_timestep_weights_are_inside_the_margin(name: str) -> None:
    combined = make(name, kind="sigmoid")
    weight = combined.timestep_weight(pairs().timestep_B, ONES)
    scaled = replace(
        pairs(), error_B2=pairs().error_B2 * weight[:, None], ref_error_B2=pairs().ref_error_B2 * weight[:, None]
    )
    loss, metrics = combined(pairs(), ONES)
    wanted, wanted_metrics = combined.objective(scaled)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=0)
    margins = metrics["rewards/margins"], wanted_metrics["rewards/margins"]
    torch.testing.assert_close(*margins, rtol=0, atol=0, equal_nan=True)


def test_budget_by_hand() -> None:
    # rewards of the preferred image: -3, 0.5, -1; of them -3 and -1 are losses of likelihood, 2 is allowed
    reward = torch.tensor([[-3.0, 9], [9, 0.5], [-1, 9], [-9, -9]], dtype=torch.float64, requires_grad=True)
    excess = budget_excess(reward, torch.tensor([0.4, -0.4, 0.4, 0.0], dtype=torch.float64), 2.0)
    assert excess.tolist() == [1, 0, 0, 0]
    excess.sum().backward()
    assert reward.grad is not None
    assert reward.grad.tolist() == [[-1, 0], [0, 0], [0, 0], [0, 0]]


def test_budget_is_added_in_margin_units() -> None:
    loss, metrics = make(budget=0.25, budget_weight=3.0)(pairs(), ONES)
    plain, _ = make()(pairs(), ONES)
    errors, reference, labels = pairs().error_B2, pairs().ref_error_B2, pairs().label_B
    wanted = []
    for b in range(6):
        w = 0 if labels[b] == 1 else 1
        wanted.append(max(0.0, BETA / 2 * float(errors[b, w] - reference[b, w]) - 0.25))
    assert 0 < sum(value > 0 for value in wanted) < 6
    np.testing.assert_allclose(metrics["budget/excess"], wanted, rtol=1e-12)
    np.testing.assert_allclose(loss - plain, 3 * np.array(wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_swapping_images_changes_nothing_with_all_terms(name: str) -> None:
    combined = make(name, kind="min-snr", budget=0.1)
    swapped = replace(swap(pairs()), timestep_B=pairs().timestep_B)
    weight = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(combined(pairs(), weight)[0], combined(swapped, weight)[0], rtol=1e-12, atol=1e-12)


def test_pair_weights_multiply_the_loss_but_not_the_metrics() -> None:
    weight = torch.arange(6, dtype=torch.float64)
    loss, metrics = make()(pairs(), weight)
    plain, plain_metrics = make()(pairs(), ONES)
    torch.testing.assert_close(loss, plain * weight, rtol=0, atol=0)
    torch.testing.assert_close(metrics["rewards/margins"], plain_metrics["rewards/margins"], rtol=0, atol=0)


def test_an_even_pair_has_no_budget_and_no_nan_gradient() -> None:
    error = torch.full((6, 2), 0.9, dtype=torch.float64, requires_grad=True)
    even = replace(pairs(), error_B2=error, preference_B=torch.full((6,), 0.5, dtype=torch.float64))
    loss, metrics = make("smpo", budget=0.0)(even, ONES)
    loss.sum().backward()
    assert metrics["budget/excess"].tolist() == [0] * 6
    assert error.grad is not None
    assert error.grad.abs().max() == 0
    assert loss[0].item() == pytest.approx(math.log(2))
