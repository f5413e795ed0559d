"""Solve inversion steps with each solver, and measure what a solver costs and reaches (see ``solvers.py``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from smpo_models.arithmetic import narrowed
from smpo_models.family import Family
from smpo_models.noise_schedules.base import START
from smpo_models.weights import DTYPES
from smpo_pipeline.inversion.batch import Batch, PreparedPair, Trajectory, Visit, draw_trajectory
from smpo_pipeline.inversion.sources import renoise_visits
from smpo_pipeline.inversion.step import distance
from smpo_pipeline.inversion.timesteps import TrajectoryPlan
from smpo_pipeline.toy.world import captions_of, random_centre, render, scene_of
from smpo_schemas.inversion_settings import InversionSettings

TRAJECTORIES = 6
"""Trajectories per pair for the published timesteps; each has one state."""


@dataclasses.dataclass
class Measured:
    """Measurements of some trajectories.

    Attributes:
        evaluations: per state.
        missed: share of the states whose solver did not reach its tolerance; None for solvers without one.
        own: all states' residuals by the inverting denoiser, in its own dtype.
        residuals, timesteps: all states' residuals by the float32 model, and where they are.
        round_trip: all images' errors.
        noise_ratio: rms of the predicted noise at all states over that at forward-noised states of the same images.
    """

    evaluations: float
    missed: float | None
    own: np.ndarray
    residuals: np.ndarray
    timesteps: np.ndarray
    round_trip: np.ndarray
    noise_ratio: float

    def cells(self, *, own: bool = False) -> list[str]:
        """Format the cells of a table row, with or without the inverting denoiser's own residuals."""
        shown = [*([self.own] if own else []), self.residuals, self.round_trip]
        spread = [f"{value:.1e}" for each in shown for value in (np.median(each), each.max())]
        missed = "" if self.missed is None else f"{100 * self.missed:.1f} %"
        return [f"{self.evaluations:.1f}", *spread, f"{self.noise_ratio:.2f}", missed]


class CountingBatch(Batch):
    """A batch that counts predicted rows (with guidance each costs two evaluations)."""

    rows = 0

    def predicted_direction(self, x_SChw: torch.Tensor, t_S: torch.Tensor, rows_S: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        self.rows += len(x_SChw)
        return super().predicted_direction(x_SChw, t_S, rows_S)


def make_pairs(count: int) -> list[PreparedPair]:
    """Make pairs of two renders of one held-out caption, with the shape at two places."""
    stream = np.random.default_rng(0)
    captions = captions_of("test")
    pairs = []
    for number in range(count):
        caption = captions[number % len(captions)]
        scene = scene_of(caption)
        pixels = np.stack([render(scene, random_centre(scene, stream)) for _ in range(2)])
        nowhere = ((0, 0), (0, 0))
        pairs.append(PreparedPair(f"{number}", caption, None, None, {}, pixels, nowhere, nowhere, measured=False))
    return pairs


def midpoint_visits(batch: Batch) -> Iterator[Visit]:
    """Carry x0 along the flow by the explicit midpoint rule: two evaluations a step, at its start and in its middle."""
    x_RChw, schedule = batch.x0_RChw.clone(), batch.noise_schedule
    s_R = torch.full((len(x_RChw),), START, dtype=schedule.timestep_dtype)
    for index in range(max(len(trajectory.plan.nodes) for trajectory in batch.trajectories)):
        rows, t, _ = batch.rows_at(index)
        x_s, s = x_RChw[rows], s_R[rows].clamp_min(0)
        middle = (s + t) / 2
        x_middle = schedule.carry(x_s, batch.predicted_direction(x_s, s, rows), s, middle)
        x_t = schedule.carry(x_s, batch.predicted_direction(x_middle, middle, rows), s, t)
        yield Visit(index, rows, t, x_t, (x_s, s, t, torch.ones_like(rows, dtype=torch.bool)), None)
        x_RChw[rows], s_R[rows] = x_t, t


def inverted(
    family: Family, trajectories: Sequence[Trajectory], settings: InversionSettings, *, midpoint: bool = False
) -> tuple[CountingBatch, list[Visit]]:
    """Invert with a copy of the denoiser in the settings' dtype; returns the batch and all visits."""
    inverting_denoiser = narrowed(family.denoiser, DTYPES[settings.dtype])
    batch = CountingBatch(trajectories, family, inverting_denoiser, settings)
    return batch, list(midpoint_visits(batch) if midpoint else renoise_visits(batch))


def noise_ratio(family: Family, batch: Batch, visits: Sequence[Visit]) -> float:
    """Compare the rms of the noise that the model predicts at the states with that at forward-noised ones."""
    stream = torch.Generator().manual_seed(0)
    squares = torch.zeros(2, dtype=torch.float64)
    for visit in visits:
        x0, conditioning = batch.x0_RChw[visit.rows_S], batch.conditioning[visit.rows_S]
        forward = batch.noise_schedule.noised(x0, torch.randn(x0.shape, generator=stream), visit.t_S)
        for number, x in enumerate((visit.x_SChw, forward)):
            output = family.denoise(family.denoiser, x, visit.t_S, conditioning)
            squares[number] += batch.noise_schedule.noise_in(output, x, visit.t_S).double().square().sum()
    return float((squares[0] / squares[1]).sqrt())


@torch.inference_mode()
def measure(
    family: Family, pairs: Sequence[PreparedPair], settings: InversionSettings, *, midpoint: bool = False
) -> Measured:
    """Invert, measure every state's residual, and sample back."""
    trajectories = [draw_trajectory(pair, 0, family, settings, 0) for pair in pairs]
    inverting_denoiser, visits = inverted(family, trajectories, settings, midpoint=midpoint)
    schedule = family.noise_schedule
    rows, exact = inverting_denoiser.rows, Batch(trajectories, family, family.denoiser, settings)

    def residuals(batch: Batch) -> np.ndarray:
        return np.concatenate([
            distance(visit.x_SChw, schedule.carry(visit.origin[0], direction, visit.origin[1], visit.t_S)).numpy()
            for visit in visits
            for direction in [batch.predicted_direction(visit.x_SChw, visit.t_S, visit.rows_S)]
        ])  # fmt: skip

    x = visits[-1].x_SChw
    for visit in reversed(visits):
        direction = exact.predicted_direction(x, visit.t_S, visit.rows_S)
        x = schedule.carry(x, direction, visit.t_S, visit.origin[1])
    trip = (x - inverting_denoiser.x0_RChw).flatten(1).norm(dim=1) / inverting_denoiser.x0_RChw.flatten(1).norm(dim=1)
    missed = [visit.solved_S > settings.tolerance for visit in visits if visit.solved_S is not None]
    timesteps = np.concatenate([visit.t_S.numpy() for visit in visits])
    return Measured(
        evaluations=rows * (2 if settings.guidance_scale != 1 else 1) / len(timesteps),
        missed=float(torch.cat(missed).double().mean()) if missed else None,
        own=residuals(inverting_denoiser),
        residuals=residuals(exact),
        timesteps=timesteps,
        round_trip=trip.numpy(),
        noise_ratio=noise_ratio(family, exact, visits),
    )


@torch.inference_mode()
def measure_published(family: Family, pairs: Sequence[PreparedPair], settings: InversionSettings) -> list[str]:
    """Compare published states with those that belong to their timestep, solved over the same grid up to t."""
    trajectories = [
        draw_trajectory(pair, number, family, settings, 0) for pair in pairs for number in range(TRAJECTORIES)
    ]
    batch, visits = inverted(family, trajectories, settings)
    grid = family.noise_schedule.grid(settings.steps, family.num_tokens(*pairs[0].image_size))
    exact_settings = settings.model_copy(update={"solver": "anderson", "tolerance": 1e-5, "eta": 0.0})
    own = [
        dataclasses.replace(trajectory, plan=_to_its_t(grid, trajectory.plan.used_at[0])) for trajectory in trajectories
    ]
    _, exact_visits = inverted(family, own, exact_settings)
    used, exact = (_last_states(found, batch) for found in (visits, exact_visits))
    t_R = torch.tensor([trajectory.plan.used_at[0] for trajectory in trajectories for _ in range(2)])
    gap = np.array([trajectory.plan.nodes[-1] - trajectory.plan.used_at[0] for trajectory in trajectories])
    outputs = [family.denoise(family.denoiser, x, t_R, batch.conditioning) for x in (used, exact)]
    a, s = batch.noise_schedule.levels(t_R, used)
    taus = [(x - a * batch.x0_RChw) / s for x in (used, exact)]
    errors = [(output - tau).square().mean((1, 2, 3)) for output, tau in zip(outputs, taus, strict=True)]
    distance_R = ((used - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).numpy()
    tau_ratio, ratio = (float(of[0].square().mean().sqrt() / of[1].square().mean().sqrt()) for of in (taus, outputs))
    return [
        f"{gap.mean():+.0f}",
        f"{100 * (gap < 0).mean():.0f} %",
        f"{np.median(distance_R):.2f}",
        f"{distance_R.max():.2f}",
        *(f"{summary(error):.3f}" for summary in (torch.median, torch.mean) for error in errors[::-1]),
        f"{tau_ratio:.2f}",
        f"{ratio:.2f}",
    ]


def _to_its_t(grid: Sequence[int], t: int) -> TrajectoryPlan:
    nodes = (*(node for node in grid if node < t), t)
    return TrajectoryPlan(nodes, nodes, (len(nodes) - 1,), (t,))


def _last_states(visits: Sequence[Visit], batch: Batch) -> torch.Tensor:
    x_RChw = torch.empty_like(batch.x0_RChw)
    for visit in visits:
        x_RChw[visit.rows_S] = visit.x_SChw
    return x_RChw
