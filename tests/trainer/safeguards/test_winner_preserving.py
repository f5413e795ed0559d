"""Winner-preserving updates, against gradients by the outputs in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from smpo_trainer.objectives import find_objective
from smpo_trainer.objectives.base import PairBatch
from smpo_trainer.objectives.pair_loss import PairLoss
from smpo_trainer.objectives.timestep_weighting import TimestepWeighting
from smpo_trainer.safeguards.winner_preserving import loser_scale
from tests.trainer.objectives.test_objectives import batch, float64
from tests.trainer.objectives.test_timestep_weighting import schedule

ELEMENTS = 12


def published(winner: torch.Tensor, loser: torch.Tensor, mu: float) -> float:
    """The factor for given differences of outputs and targets, by derivatives as in the published code."""
    outputs = [residual.clone().requires_grad_(True) for residual in (winner, loser)]
    gradients = [torch.autograd.grad(output.square().mean(), output)[0] for output in outputs]
    aligned = float((gradients[0] * gradients[1]).sum())
    return min(1.0, (1 - mu) * float(gradients[0].square().sum()) / aligned) if aligned > 0 else 1.0


def drawn() -> torch.Tensor:
    """Differences of outputs and targets, [6, 2, N], in part along the same direction."""
    generator = torch.Generator().manual_seed(3)
    residual = torch.randn(6, 2, ELEMENTS, generator=generator, dtype=torch.float64)
    common = torch.randn(6, 1, ELEMENTS, generator=generator, dtype=torch.float64)
    residual += common * float64(2, -3, 3, 0.2, 4, 1)[:, None, None]
    residual[1, 1] *= -1
    return residual


def pairs_of(residual_B2N: torch.Tensor, **changes: torch.Tensor) -> PairBatch:
    error, cross = residual_B2N.square().mean(2), residual_B2N.detach().prod(1).mean(1)
    return batch(error_B2=error, ref_error_B2=error.detach() + 0.1 * batch().ref_error_B2, cross_B=cross, **changes)


def loss_of(name: str, mu: float | None, beta: float = 2.0) -> PairLoss:
    kind = find_objective(name)
    objective = kind(kind.Options.parse(name, {}, beta=beta))
    weighting = TimestepWeighting("uniform", 5.0, 0.0)
    return PairLoss(objective, schedule("epsilon"), weighting, None, 1.0, winner_preserving=mu)


@pytest.mark.parametrize("mu", [0.0, 0.4, 1.0])
def test_factors_are_those_of_the_published_rule(mu: float) -> None:
    residual, label = drawn(), batch().label_B
    wanted = [published(*(pair if y else pair.flip(0)), mu) for pair, y in zip(residual, label, strict=True)]
    assert min(wanted) < 1 == max(wanted)
    pairs = pairs_of(residual)
    assert pairs.cross_B is not None
    np.testing.assert_allclose(loser_scale(pairs.error_B2, pairs.cross_B, label - 0.5, mu), wanted, rtol=1e-12)


def test_by_hand() -> None:
    """e_w / <r_w, r_l>: 1/2, 2 (so 1), a negative product, no product, and no preferred image."""
    error = float64(1, 4, 1, 1, 1)[:, None] * float64(1, 9)
    cross = float64(2, 2, -3, 0, 5)
    preferred = float64(1, 1, 1, 1, 0)
    assert loser_scale(error, cross, preferred, 0.0).tolist() == [0.5, 1, 1, 1, 1]
    assert loser_scale(error, cross, preferred, 0.5).tolist() == [0.25, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["smpo", "dpo", "npo", "ipo", "capo", "dmpo", "linear-dpo"])
def test_only_the_gradient_of_the_other_image_changes(name: str) -> None:
    def run(mu: float | None, *, swapped: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        residual = drawn().requires_grad_(True)
        pairs = pairs_of(residual)
        if swapped:
            pairs = replace(
                pairs,
                error_B2=pairs.error_B2.flip(1),
                ref_error_B2=pairs.ref_error_B2.flip(1),
                preference_B=1 - pairs.preference_B,
                label_B=1 - pairs.label_B,
            )
        loss, metrics = loss_of(name, mu)(pairs, torch.ones(6, dtype=torch.float64))
        loss.sum().backward()
        assert residual.grad is not None
        return loss.detach(), residual.grad, metrics

    plain_loss, plain_gradient, _ = run(None)
    loss, gradient, metrics = run(0.0)
    torch.testing.assert_close(loss, plain_loss, rtol=0, atol=0)
    objective = loss_of(name, None).objective
    prefers_first = objective.preferred(pairs_of(drawn())) > 0
    for b, (pair, first) in enumerate(zip(drawn(), prefers_first, strict=True)):
        w = 0 if first else 1
        scale = published(pair[w], pair[1 - w], 0.0)
        assert metrics["winner_preserving/scale"][b] == pytest.approx(scale, rel=1e-12)
        torch.testing.assert_close(gradient[b, w], plain_gradient[b, w], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient[b, 1 - w], scale * plain_gradient[b, 1 - w], rtol=1e-12, atol=1e-300)
    for ours, other in zip(run(0.0), run(0.0, swapped=True), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("mu", "falls"), [(None, False), (0.0, True)])
def test_a_step_does_not_raise_the_preferred_images_error(mu: float | None, falls: bool) -> None:
    """If both outputs move alike with the weights: here they are the weights, plus a constant for each image."""
    weights = torch.zeros(ELEMENTS, dtype=torch.float64, requires_grad=True)
    target = drawn()
    target[:, 1] = 3 * target[:, 0]  # the other image's gradient is three times as long, in the same direction

    def run() -> PairBatch:
        ones = torch.ones(6, dtype=torch.float64)
        return pairs_of(weights - target, label_B=ones, preference_B=0.9 * ones)

    before = run()
    loss_of("dpo", mu)(before, torch.ones(6, dtype=torch.float64))[0][0].backward()
    assert weights.grad is not None
    with torch.no_grad():
        weights -= 1e-4 * weights.grad
        change = float(run().error_B2[0, 0] - before.error_B2[0, 0])
    assert (change <= 1e-9) == falls


def test_no_preferred_image_means_full_gradients_and_no_metric() -> None:
    even = pairs_of(drawn(), preference_B=torch.full((6,), 0.5, dtype=torch.float64))
    _, metrics = loss_of("smpo", 0.0)(even, torch.ones(6, dtype=torch.float64))
    assert metrics["winner_preserving/scale"].isnan().all()
