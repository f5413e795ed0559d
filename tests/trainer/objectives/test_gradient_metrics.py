"""The gradient factor, the share of saturated states, and the root mean square of the margins."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smpo_trainer.monitoring.metrics import StepMeter
from tests.trainer.objectives.plain import BETA, GAMMA
from tests.trainer.objectives.test_objectives import NAMES, batch, batch_of_margins, float64, make

SIGMOID = ("dpo", "npo", "smpo")


@pytest.mark.parametrize("name", SIGMOID)
def test_at_the_reference_the_factor_is_a_half_whatever_beta_is(name: str) -> None:
    for beta in (1.0, 30_000.0):
        _, metrics = make(name, beta=beta)(batch(ref_error_B2=batch().error_B2))
        assert metrics["gradient_factor"].tolist() == [0.5] * 6
        assert metrics["saturated"].tolist() == [0] * 6


@pytest.mark.parametrize("name", SIGMOID)
def test_the_factor_is_the_slope_of_the_loss(name: str) -> None:
    """The loss's derivative by image_0's error is the factor times beta/2, and for smpo times gamma |2p - 1|."""
    error = batch().error_B2.clone().requires_grad_(True)
    loss, metrics = make(name)(batch(error_B2=error))
    loss.sum().backward()
    assert error.grad is not None
    scale = GAMMA * (2 * batch().preference_B - 1).abs() if name == "smpo" else 1
    torch.testing.assert_close(error.grad[:, 0].abs(), BETA / 2 * scale * metrics["gradient_factor"])


def test_by_hand() -> None:
    """sigmoid(-h) of the margins toward the label: 0, ln 4, ln 19 - 0.01, ln 19 + 0.01, -5; a tie has no value."""
    edge = math.log(19)
    margin = float64(0, -math.log(4), edge - 0.01, edge + 0.01, 5, 3)
    _, metrics = make("dpo")(batch_of_margins(margin, float64(1, 0, 1, 1, 0, 0.5)))
    wanted = [0.5, 0.2, 1 / (1 + 19 * math.exp(-0.01)), 1 / (1 + 19 * math.exp(0.01)), 1 / (1 + math.exp(-5)), math.nan]
    np.testing.assert_allclose(metrics["gradient_factor"], wanted, rtol=1e-9)
    np.testing.assert_equal(metrics["saturated"].tolist(), [0, 0, 0, 1, 0, math.nan])
    np.testing.assert_allclose(metrics["rewards/margins_rms"], [0, math.log(4), *margin[2:4], -5, math.nan], rtol=1e-9)


@pytest.mark.parametrize("name", sorted({*NAMES} - {*SIGMOID}))
def test_other_losses_have_none(name: str) -> None:
    assert not {"gradient_factor", "saturated"} & make(name)(batch())[1].keys()


def test_the_root_is_taken_of_the_mean_square_of_all_micro_batches() -> None:
    meter = StepMeter()
    for values in ((3.0, math.nan), (-4.0, 0.0)):
        meter.add({"rewards/margins": torch.tensor(values), "rewards/margins_rms": torch.tensor(values)})
    meter.add({"rewards/margins": torch.tensor([5.0]), "rewards/margins_rms": torch.tensor([5.0])})
    means = meter.means(SimpleNamespace(reduce=lambda sums, _how: sums))  # type: ignore[arg-type]
    assert means == pytest.approx({"rewards/margins": 1, "rewards/margins_rms": math.sqrt(12.5)}, rel=1e-12)
