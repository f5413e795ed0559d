"""Linear-DPO by hand; tests of all objectives compare it with a plain version, too."""

from __future__ import annotations

import pytest
import torch

from smpo_common.errors import UserError
from smpo_trainer.objectives import find_objective
from smpo_trainer.objectives.linear_dpo import linear_dpo_loss
from tests.trainer.objectives.test_objectives import batch, batch_of_margins, float64, make


def test_weights_by_hand() -> None:
    """clip(1/2 - 0.4 s h, eta, 1 - eta) at s h = 0, 1, -0.5, 5, -5; the gradient of e_w - e_l is 1 and -1."""
    error = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    margin, label = float64(0, 1, 0.5, 5, 5), float64(1, 1, 0, 1, 0)
    loss = linear_dpo_loss(error, margin, label, eta=0.01)
    assert loss.tolist() == [0] * 5
    loss.sum().backward()
    assert error.grad is not None
    weights = float64(0.5, 0.1, 0.7, 0.01, 0.99)
    sign = 2 * label - 1
    torch.testing.assert_close(error.grad, torch.stack([sign * weights, -sign * weights], dim=1))


def test_the_loss_by_hand() -> None:
    """e_w - e_l = -0.2, and beta 20 makes h = 10 (0.2 - 0.15) = 0.5: the weight is 0.3."""
    pairs = batch(
        error_B2=torch.tensor([[0.4, 0.6]], dtype=torch.float64),
        ref_error_B2=torch.tensor([[0.45, 0.6]], dtype=torch.float64),
        label_B=float64(1),
    )
    loss, metrics = make("linear-dpo")(pairs)
    assert loss.item() == pytest.approx(0.3 * -0.2, rel=1e-12)
    assert metrics["rewards/margins"].item() == pytest.approx(0.5, rel=1e-12)


def test_at_the_reference_it_has_dpos_gradient_over_half_of_beta() -> None:
    def gradient(name: str) -> torch.Tensor:
        pairs = batch_of_margins(float64(0, 0), float64(1, 0))
        error = pairs.error_B2.clone().requires_grad_(True)
        make(name, beta=500).loss(batch(**{**vars(pairs), "error_B2": error})).sum().backward()
        assert error.grad is not None
        return error.grad

    torch.testing.assert_close(gradient("dpo"), 250 * gradient("linear-dpo"), rtol=1e-12, atol=0)


def test_published_settings() -> None:
    kind = find_objective("linear-dpo")
    assert [kind.resolve_beta(None, family) for family in ("sd15", "sdxl")] == [100, 500]
    assert kind.Options.parse("linear-dpo", {}, beta=1).eta == 1e-3
    with pytest.raises(UserError, match="--objective linear-dpo: no beta is published for sd3 models"):
        kind.resolve_beta(None, "sd3")
    with pytest.raises(UserError, match="--objective-option eta=0.5: Input should be less than 0.5"):
        kind.Options.parse("linear-dpo", {"eta": "0.5"}, beta=1)
