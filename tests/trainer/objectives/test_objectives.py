from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from smpo_schemas.errors import UserError
from smpo_trainer.objectives import ObjectiveOptions, find_objective, objectives
from smpo_trainer.objectives.base import PairBatch, implicit_margin
from smpo_trainer.objectives.dpo import DPO, dpo_loss
from smpo_trainer.objectives.smpo import SmPO, smpo_loss


def batch(**changes: torch.Tensor) -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    values = {
        "error_B2": torch.rand(6, 2, generator=generator, dtype=torch.float64),
        "ref_error_B2": torch.rand(6, 2, generator=generator, dtype=torch.float64),
        "preference_B": torch.tensor([0.9, 0.2, 0.6, 0.55, 0.45, 0.1], dtype=torch.float64),
        "label_B": torch.tensor([1, 0, 1, 0, 1, 0], dtype=torch.float64),
        "timestep_B": torch.arange(6),
    }
    return PairBatch(**{**values, **changes})


def swap(pairs: PairBatch) -> PairBatch:
    return PairBatch(
        pairs.error_B2.flip(1), pairs.ref_error_B2.flip(1), 1 - pairs.preference_B, 1 - pairs.label_B, pairs.timestep_B
    )


def test_found_by_itself() -> None:
    assert {"smpo", "dpo"} <= set(objectives())
    with pytest.raises(UserError, match="--objective nonsense is not known; known: dpo, smpo"):
        find_objective("nonsense")


def test_smpo_value_and_gradient_by_hand() -> None:
    # beta 2000: d_theta = 0.001, d_ref = 0.0015, so h = -1000 * -0.0005 = 0.5; gamma (2p - 1) = 10 * 0.4 = 4
    error = torch.tensor([[0.501, 0.5]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.4015, 0.4]], dtype=torch.float64)
    margin = implicit_margin(error, reference, 2000.0)
    assert margin.item() == pytest.approx(0.5, abs=1e-10)
    loss = smpo_loss(margin, torch.tensor([0.7], dtype=torch.float64), 10.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-10)
    loss.sum().backward()
    slope = -4 * (1 / (1 + math.exp(2))) * -1000  # dloss/dh * dh/derror_0
    assert error.grad is not None
    np.testing.assert_allclose(error.grad.numpy(), [[slope, -slope]], rtol=1e-9)


def test_dpo_value_and_gradient_by_hand() -> None:
    margin = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(margin, torch.tensor([1.0, 0.0], dtype=torch.float64))
    np.testing.assert_allclose(loss.tolist(), [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))], rtol=1e-12)
    loss.sum().backward()
    assert margin.grad is not None
    np.testing.assert_allclose(margin.grad.tolist(), [-1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))], rtol=1e-12)


@pytest.mark.parametrize("objective", [SmPO, DPO])
def test_reference_as_model_gives_ln_2(objective: type[SmPO | DPO]) -> None:
    same = torch.rand(6, 2)
    loss, _ = objective(ObjectiveOptions(2000, 10))(batch(error_B2=same, ref_error_B2=same.clone()))
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_even_preference_has_no_gradient() -> None:
    error = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    pairs = batch(error_B2=error, preference_B=torch.full((6,), 0.5, dtype=torch.float64))
    loss, metrics = SmPO(ObjectiveOptions(2000, 10))(pairs)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    loss.mean().backward()
    assert error.grad is not None
    assert error.grad.abs().max() == 0
    assert metrics["rewards/margins"].isnan().all()


def test_smpo_at_full_strength_is_dpo() -> None:
    # p = 1 and p = 0 with gamma 1: gamma (2p - 1) is the sign of label - 1/2
    pairs = batch(preference_B=batch().label_B)
    for ours, theirs in zip(
        SmPO(ObjectiveOptions(2000, 1))(pairs)[0], DPO(ObjectiveOptions(2000, 1))(pairs)[0], strict=True
    ):
        assert ours == theirs


@pytest.mark.parametrize("objective", [SmPO, DPO])
def test_swapping_images_changes_nothing(objective: type[SmPO | DPO]) -> None:
    loss, metrics = objective(ObjectiveOptions(2000, 10))(batch())
    swapped_loss, swapped_metrics = objective(ObjectiveOptions(2000, 10))(swap(batch()))
    torch.testing.assert_close(loss, swapped_loss, rtol=1e-12, atol=1e-12)
    for name, values in metrics.items():
        torch.testing.assert_close(values, swapped_metrics[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("objective", [SmPO, DPO])
def test_a_pair_is_independent_of_its_batch(objective: type[SmPO | DPO]) -> None:
    pairs = batch()
    loss, _ = objective(ObjectiveOptions(2000, 10))(pairs)
    one = PairBatch(*(getattr(pairs, name)[2:3] for name in PairBatch.__dataclass_fields__))
    assert objective(ObjectiveOptions(2000, 10))(one)[0].item() == loss[2].item()


def test_reward_metrics_by_hand() -> None:
    pairs = batch(
        error_B2=torch.tensor([[0.4, 0.6], [0.4, 0.6]], dtype=torch.float64),
        ref_error_B2=torch.full((2, 2), 0.5, dtype=torch.float64),
        preference_B=torch.tensor([0.9, 0.2], dtype=torch.float64),
    )
    _, metrics = SmPO(ObjectiveOptions(20, 10))(pairs)
    # rewards are -10 (error - 0.5): +1 for image_0, -1 for image_1
    np.testing.assert_allclose(metrics["rewards/chosen"].tolist(), [1, -1])
    np.testing.assert_allclose(metrics["rewards/rejected"].tolist(), [-1, 1])
    np.testing.assert_allclose(metrics["rewards/margins"].tolist(), [2, -2])
    assert metrics["rewards/accuracies"].tolist() == [1, 0]


def test_usable_pairs() -> None:
    nan = math.nan
    p, label = np.array([0.5, nan, 0.7, 0.2]), np.array([1.0, 0.0, 0.5, nan])
    assert SmPO.usable(p, label).tolist() == [True, False, True, True]
    assert DPO.usable(p, label).tolist() == [True, True, False, False]
