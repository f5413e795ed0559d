"""Solvers against steps whose exact solution is known: eps(x, t) linear in x, with chosen eigenvalues."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from smpo_common.errors import UserError
from smpo_models.loading import load_family
from smpo_models.noise_schedules.variance_preserving import VariancePreserving
from smpo_pipeline.inversion.batch import Batch, draw_trajectory
from smpo_pipeline.inversion.solvers import SOLVERS
from smpo_pipeline.inversion.sources import renoise_visits
from smpo_pipeline.inversion.step import Step
from smpo_pipeline.toy.create import ASSETS
from smpo_schemas.inversion_settings import InversionSettings, averaged_estimates
from tests.inversion.helpers import embedded_pair

SCHEDULE = VariancePreserving(DDIMScheduler(set_alpha_to_one=False))
SHAPE = (1, 2, 3)
S, T = 100, 250
TIGHT = {"tolerance": 1e-9, "max_evaluations": 60}


class Linear:
    """One row: x -> F(x_s, M x + b) has the given eigenvalues, and so the solution (1 - dM)^-1 (c x_s + d b)."""

    def __init__(self, eigenvalues: list[float], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        a_s, a_t = (float(SCHEDULE.scheduler.alphas_cumprod[t].double()) ** 0.5 for t in (S, T))
        s_s, s_t = (1 - a_s**2) ** 0.5, (1 - a_t**2) ** 0.5
        self.c, self.d = a_t / a_s, s_t - a_t * s_s / a_s
        basis, _ = torch.linalg.qr(torch.randn(6, 6, **draw))
        self.matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T / self.d
        self.bias, self.x_s = torch.randn(6, **draw), torch.randn(6, **draw)

    def eps(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix @ x + self.bias

    def step(self, eps: torch.Tensor) -> torch.Tensor:
        return self.c * self.x_s + self.d * eps

    def exact(self) -> torch.Tensor:
        identity = torch.eye(6, dtype=torch.float64)
        return torch.linalg.solve(identity - self.d * self.matrix, self.c * self.x_s + self.d * self.bias)


def solve(rows: list[Linear], **settings):
    """The solution, and how many evaluations each row was given."""
    evaluations = [0] * len(rows)

    def predict(x_NChw: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        for row in rows_N.tolist():
            evaluations[row] += 1
        found = [rows[row].eps(x.flatten()).reshape(SHAPE) for row, x in zip(rows_N.tolist(), x_NChw, strict=True)]
        return torch.stack(found)

    x_s = torch.stack([row.x_s.reshape(SHAPE) for row in rows])
    levels = (torch.full((len(rows),), t, dtype=torch.int64) for t in (S, T))
    chosen = InversionSettings(**settings)
    return SOLVERS[chosen.solver](Step(predict, SCHEDULE, x_s, *levels), chosen), evaluations


MILD = [0.5, 0.3, -0.2, 0.1, -0.4, 0.0]
SWINGING = [-1.6, 0.2, -0.9, 0.1, 0.3, -0.3]
BEYOND = [1.8, 0.2, -0.5, 0.3, 0.1, -0.1]


@pytest.mark.parametrize(
    ("solver", "eigenvalues"),
    [("adaptive", MILD), ("adaptive", SWINGING), ("anderson", MILD), ("anderson", SWINGING), ("anderson", BEYOND)],
)
def test_convergence_to_the_exact_solution(solver, eigenvalues):
    rows = [Linear(eigenvalues, seed) for seed in range(3)]
    solution, evaluations = solve(rows, solver=solver, **TIGHT)
    for x, residual, row in zip(solution.x_RChw, solution.residual_R, rows, strict=True):
        torch.testing.assert_close(x.flatten(), row.exact(), rtol=1e-7, atol=1e-7)
        expected = (x.flatten() - row.step(row.eps(x.flatten()))).norm() / x.norm()
        assert float(residual) == pytest.approx(float(expected), abs=1e-13)
        assert residual <= 1e-9
    assert max(evaluations) < 60


def test_anderson_needs_fewer_evaluations():
    rows = [Linear(MILD, 0)]
    assert solve(rows, solver="anderson", **TIGHT)[1][0] < solve(rows, solver="adaptive", **TIGHT)[1][0]


class Near(Linear):
    """The solution is near x_s, so that x keeps its size where the residual grows."""

    def __init__(self, eigenvalues: list[float], seed: int) -> None:
        super().__init__(eigenvalues, seed)
        solution = self.x_s + 0.05 * torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.bias = (solution - self.c * self.x_s) / self.d - self.matrix @ solution


class Cliff(Linear):
    """Further from x_s than 1.5 times the solution is, the model gives no numbers."""

    def eps(self, x: torch.Tensor) -> torch.Tensor:
        if (x - self.x_s).norm() > 1.5 * (self.exact() - self.x_s).norm():
            return torch.full_like(x, torch.nan)
        return super().eps(x)


@pytest.mark.parametrize(
    ("solver", "row"),
    [
        ("adaptive", Near([-6.0] * 6, 0)),
        ("adaptive", Near([-9.0] * 6, 0)),
        ("adaptive", Near([-9.0, -9.0, -6.0, -6.0, -3.0, -3.0], 1)),
        ("adaptive", Cliff([-3.0] * 6, 0)),
        ("anderson", Near([-9.0] * 6, 0)),
        ("anderson", Linear([-9.0, 0.2, -0.5, 0.3, 0.1, -0.1], 0)),
        ("anderson", Linear([-9.0, 1.8, -0.5, 0.3, 0.1, -0.1], 0)),
        ("anderson", Cliff([-3.0] * 6, 0)),
        ("anderson", Cliff([-3.0, -3.0, -3.0, 0.5, 0.1, 0.2], 0)),
    ],
)
def test_each_point_that_is_lost_shortens_the_next_step(solver, row):
    """Residuals that grow up to ninefold, or are no numbers, at a full step: half a step is still too long."""
    solution, _ = solve([row], solver=solver, **TIGHT)
    torch.testing.assert_close(solution.x_RChw[0].flatten(), row.exact(), rtol=1e-7, atol=1e-7)
    assert solution.residual_R <= TIGHT["tolerance"]


def test_a_row_that_no_damping_mends_is_marked_and_not_looped_on():
    hopeless = Linear(BEYOND, 1)
    for limit in (60, 1000):
        solution, (evaluations,) = solve([hopeless], solver="adaptive", tolerance=1e-6, max_evaluations=limit)
        assert evaluations < 60
        x = solution.x_RChw[0].flatten()
        expected = (x - hopeless.step(hopeless.eps(x))).norm() / x.norm()
        assert float(solution.residual_R[0]) == pytest.approx(float(expected))
        assert float(expected) > 1e-6


@pytest.mark.parametrize("solver", ["adaptive", "anderson"])
def test_a_row_does_not_depend_on_its_neighbours(solver):
    """Not even on ones that diverge or are no numbers; and a row that is done costs no more."""
    broken = Linear(MILD, 4)
    broken.bias[0] = torch.nan
    rows = [Linear(MILD, 2), Linear(BEYOND, 1), broken, Linear([0.0] * 6, 3), Linear(SWINGING, 5)]
    together, evaluations = solve(rows, solver=solver, **TIGHT)
    for index, row in enumerate(rows):
        alone, (count,) = solve([row], solver=solver, **TIGHT)
        torch.testing.assert_close(alone.x_RChw[0], together.x_RChw[index], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(alone.residual_R[0], together.residual_R[index], rtol=0, atol=0, equal_nan=True)
        assert count == evaluations[index]
    assert evaluations[2] == 1
    assert together.residual_R[2].isnan()
    assert evaluations[3] == 2  # eps does not depend on x: the first image is the solution


@pytest.mark.parametrize(
    ("average", "chosen"), [("last2", (2, 3)), ("all", (0, 1, 2, 3)), ("1,3", (1, 3)), ("last1", (3,))]
)
def test_renoise_steps_with_the_mean_of_the_chosen_estimates(average, chosen):
    row = Linear(MILD, 0)
    estimates = [row.eps(row.x_s)]
    for _ in range(3):
        estimates.append(row.eps(row.step(estimates[-1])))
    expected = row.step(sum(estimates[index] for index in chosen) / len(chosen))
    solution, evaluations = solve([row], solver="renoise", renoise_steps=3, renoise_average=average)
    torch.testing.assert_close(solution.x_RChw.flatten(), expected)
    assert (evaluations, solution.residual_R) == ([4], None)


def test_ddim_is_renoise_without_iterations():
    row = Linear(MILD, 0)
    solution, evaluations = solve([row], solver="ddim")
    torch.testing.assert_close(solution.x_RChw.flatten(), row.step(row.eps(row.x_s)))
    assert evaluations == [1]
    assert torch.equal(solution.x_RChw, solve([row], solver="renoise", renoise_steps=0)[0].x_RChw)


def test_which_estimates_there_are():
    assert averaged_estimates("last2", 0) == {0}
    assert averaged_estimates("last2", 5) == {4, 5}
    for text in ("last0", "first2", "2", "0,x", "", "last", "-1"):
        with pytest.raises(UserError, match="--renoise-average"):
            averaged_estimates(text, 1)


def test_carry_there_and_back_is_the_identity():
    x, eps = torch.randn(2, 3, *SHAPE, dtype=torch.float64)
    s, t = torch.tensor([-1, 20, 500]), torch.tensor([20, 500, 999])
    there = SCHEDULE.carry(x, eps, s, t)
    torch.testing.assert_close(SCHEDULE.carry(there, eps, t, s), x)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "exact"), [("ddim", False), ("adaptive", True), ("anderson", True)])
@torch.inference_mode()
def test_sampling_back_returns_to_x0_from_solved_states_only(solver, exact):
    """On the embedded world's model, float32, over the same nodes, with diffusers' own DDIM formula."""
    family = load_family(str(ASSETS / "model"))
    settings = InversionSettings(solver=solver, prompt_dropout=0, hflip=False)
    batch = Batch([draw_trajectory(embedded_pair(), 0, family, settings, 0)], family, family.denoiser, settings)
    visits = list(renoise_visits(batch))
    if exact:
        assert max(float(visit.solved_S.max()) for visit in visits) < 1e-4
    x, alphas = visits[-1].x_SChw, family.noise_schedule.scheduler.alphas_cumprod
    for visit in reversed(visits):
        eps = batch.predicted_direction(x, visit.t_S, visit.rows_S)
        now, before = (alphas[t.clamp_min(0)].reshape(-1, 1, 1, 1) for t in (visit.t_S, visit.origin[1]))
        predicted_x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = before.sqrt() * predicted_x0 + (1 - before).sqrt() * eps
    error = float((x - batch.x0_RChw).norm() / batch.x0_RChw.norm())
    assert error < 1e-3 if exact else error > 0.1
