"""The robust mean of a step (``--robust``), against a plain float64 version over the whole step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smpo_trainer.monitoring.metrics import Record
from smpo_trainer.safeguards.robust import RobustMean
from tests.trainer.conftest import Train
from tests.trainer.helpers import column
from tests.trainer.objectives.test_objective_flags import write_scores
from tests.trainer.safeguards.fakes import in_processes

Split = Sequence[Sequence[Sequence[int]]]
"""The states of each micro-batch of each process."""


def run(losses: Sequence[float], weights: Sequence[float], scale: float, split: Split, form: str = "pair") -> Any:
    """The gradient by each state's loss, averaged over the processes like DDP does, and the record."""
    n, world = len(losses), len(split)

    def work(accelerator: Any, rank: int) -> tuple[torch.Tensor, Record]:
        loss = torch.nn.Parameter(torch.tensor(losses, dtype=torch.float64))
        weight = torch.tensor(weights, dtype=torch.float64)
        robust = RobustMean(scale, form, n, accelerator, [loss])
        for states in split[rank]:
            total = robust.add((loss * weight)[list(states)], weight[list(states)])
            (total * world / n).backward()
        record = robust.finish()
        assert loss.grad is not None
        return loss.grad, record

    results = in_processes(world, work)
    assert all(str(record) == str(results[0][1]) for _, record in results)  # as text: NaN is not equal to NaN
    return torch.stack([gradient for gradient, _ in results]).mean(0), results[0][1]


def plain(losses: Sequence[float], weights: Sequence[float], scale: float, form: str) -> tuple[torch.Tensor, float]:
    loss = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(weights, dtype=torch.float64)
    x = loss * weight if form == "pair" else loss
    value = scale * torch.log(torch.exp(x / scale).mean()) * (1 if form == "pair" else weight.mean())
    value.backward()
    assert loss.grad is not None
    return loss.grad, value.item()


def test_by_hand() -> None:
    gradient, record = run([1, 2], [1, 1], 1, [[[0, 1]]])
    assert gradient.tolist() == pytest.approx([0.26894, 0.73106], abs=1e-5)
    assert record["robust/loss"] == pytest.approx(1.62011, abs=1e-5)
    assert record["robust/largest_share"] == pytest.approx(0.73106, abs=1e-5)
    assert record["robust/effective"] == pytest.approx(1 / (0.26894**2 + 0.73106**2), rel=1e-4)
    gradient, record = run([1, 2], [1, 0.5], 1, [[[0], [1]]])  # both x are 1
    assert gradient.tolist() == pytest.approx([0.5, 0.25], rel=1e-12)
    assert record == pytest.approx({"robust/loss": 1, "robust/largest_share": 0.5, "robust/effective": 2}, rel=1e-12)


LOSSES, WEIGHTS = (0.4, 3.0, -1.0, 0.7, 5.0, 0.1, 2.0, 0.69), (1.0, 0.5, 2.0, 1.0, 0.3, 1.5, 1.0, 0.7)
SPLITS: dict[str, Split] = {
    "one micro-batch": [[range(8)]],
    "eight": [[[state] for state in range(8)]],
    "eight, the largest first": [[[state] for state in (4, 1, 6, 0, 2, 3, 5, 7)]],
    "two processes": [[[0, 1], [4, 5]], [[2, 3], [6, 7]]],
    "four processes": [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("form", ["pair", "list"])
@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_micro_batches_and_processes_do_not_matter(split: Split, form: str, scale: float) -> None:
    gradient, record = run(LOSSES, WEIGHTS, scale, split, form)
    wanted, value = plain(LOSSES, WEIGHTS, scale, form)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-12)
    assert record["robust/loss"] == pytest.approx(value, rel=1e-9)


def test_its_limits() -> None:
    x = np.array(LOSSES) * WEIGHTS
    gradient, record = run(LOSSES, WEIGHTS, 1e9, SPLITS["eight"])
    np.testing.assert_allclose(gradient, np.array(WEIGHTS) / 8, rtol=1e-6)
    assert record["robust/loss"] == pytest.approx(x.mean(), rel=1e-5)
    gradient, record = run(LOSSES, WEIGHTS, 1e-4, SPLITS["eight"])  # exponents of 10,000: only the largest x is left
    np.testing.assert_allclose(gradient, np.where(x == x.max(), WEIGHTS, 0))
    assert record["robust/loss"] == pytest.approx(x.max(), abs=1e-3)
    _, record = run([0.69] * 4, [1] * 4, 0.1, [[[0, 1], [2, 3]]])
    assert record == pytest.approx({"robust/loss": 0.69, "robust/largest_share": 1 / 4, "robust/effective": 4})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_reaches_every_gradient(bad: float) -> None:
    """So that all processes skip the step."""
    gradient, _ = run([0.1, bad, 0.3, 0.4], [1] * 4, 1, [[[0], [1]], [[2], [3]]])
    assert gradient.isnan().all()


@pytest.mark.slow
def test_a_run_does_not_depend_on_its_micro_batches(train: Train, other_unet: Path, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", trust=[1.5, 0.5, 1.0, 2.0, 0.2, 1.0])
    options = {"robust": 0.05, "scores": scores, "weight_column": "trust", "objective": "dpo"}
    options |= {"unet": other_unet, "beta": 200, "lr": 1e-5, "max_steps": 2}
    large = train("large", batch_size=4, **options)
    small = train("small", batch_size=1, grad_accum=4, **options)
    for name in ("robust/loss", "robust/largest_share", "robust/effective", "grad_norm"):
        np.testing.assert_allclose(column(small, name), column(large, name), rtol=1e-4)
    assert column(large, "robust/loss")[0] > column(large, "loss")[0]
    assert 1 < column(large, "robust/effective")[0] < 3.9
