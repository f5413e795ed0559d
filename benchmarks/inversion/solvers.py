"""Measure what each solver of an inversion step costs and reaches: writes docs/results/solvers.md.

On a few pairs of the embedded world, without dropped prompts or flips, this reports for each solver:

- evaluations of the denoiser per state (one image at one timestep);
- the residual of every state, by one more evaluation of the float32 model, which is not counted;
- the round trip: the model's first-order sampler (DDIM, or Euler's for flow models), with the float32 model, from the
  last state back over the same nodes, and how far it ends from the latents that the trajectory began with;
- the noise ratio over all states, by two more evaluations of the float32 model that are not counted.

Further tables: inverting denoisers rounded to narrow types, guided trajectories, and for Stable Diffusion the published
timesteps. For the flow model also the explicit midpoint rule, the step of RF-Solver (arXiv 2411.04746).

    python -m benchmarks.inversion.solvers [--family sd15|sd3] [--pairs 6]

About four minutes for sd15 and fifteen for sd3, on one CPU core.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from benchmarks.page import IMAGES, RESULTS, stamp, write_page
from smpo_models.arithmetic import narrowed
from smpo_models.family import Family
from smpo_models.loading import load_family
from smpo_models.noise_schedules.base import START
from smpo_models.weights import DTYPES
from smpo_pipeline.inversion.batch import Batch, PreparedPair, Trajectory, Visit, draw_trajectory
from smpo_pipeline.inversion.health import NUM_BANDS
from smpo_pipeline.inversion.sources import renoise_visits
from smpo_pipeline.inversion.step import distance
from smpo_pipeline.inversion.timesteps import TrajectoryPlan
from smpo_pipeline.toy.create import MODELS
from smpo_pipeline.toy.world import captions_of, random_centre, render, scene_of
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import FLOW

mpl.use("Agg")
from matplotlib import pyplot as plt

PAGES = {"sd15": "solvers", "sd3": "solvers_flow"}
TITLES = {"sd15": "What the solvers reach", "sd3": "What the solvers reach on a flow model"}
MIDPOINT = "midpoint"

SOLVERS: dict[str, dict[str, Any]] = {
    "ddim": {"solver": "ddim"},
    "renoise 1 (published)": {"renoise_steps": 1},
    "renoise 3": {"renoise_steps": 3},
    "renoise 5": {"renoise_steps": 5},
    "adaptive 1e-4": {"solver": "adaptive"},
    "adaptive 1e-5": {"solver": "adaptive", "tolerance": 1e-5},
    "anderson 1e-4": {"solver": "anderson"},
    "anderson 1e-4, depth 2": {"solver": "anderson", "anderson_depth": 2},
    "anderson 1e-5": {"solver": "anderson", "tolerance": 1e-5},
}
STEPS = (5, 9, 20)
NARROW: dict[str, dict[str, Any]] = {
    "renoise 1": {"renoise_steps": 1},
    "renoise 5": {"renoise_steps": 5},
    "anderson 1e-4": {"solver": "anderson", "tolerance": 1e-4},
    "anderson 3e-4": {"solver": "anderson", "tolerance": 3e-4},
    "anderson 2e-3": {"solver": "anderson", "tolerance": 2e-3},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "renoise 1 (SmPO)": {"renoise_steps": 1},
    "renoise 0, eta 0.1 (InPO)": {"renoise_steps": 0, "eta": 0.1},
    "anderson 1e-5": {"solver": "anderson", "tolerance": 1e-5},
}
TRAJECTORIES = 6
"""Trajectories per pair for the published timesteps; each has one state."""

GUIDED = ("renoise 1 (published)", "renoise 5", "adaptive 1e-4", "anderson 1e-4")


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


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(found: dict[int, dict[str, Measured]], plot: Path) -> None:
    """Plot cost against round trip, and the residual along the trajectory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for steps, marker in zip(STEPS, "^os", strict=True):
        for index, (name, measured) in enumerate(found[steps].items()):
            label = name if steps == STEPS[1] else None
            trip = np.median(measured.round_trip)
            left.scatter(measured.evaluations, trip, marker=marker, color=f"C{index}", label=label)
    left.axhline(1e-3, color="0.6", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="evaluations a state", ylabel="round-trip error (median, relative)")
    left.set_title(f"triangle {STEPS[0]}, circle {STEPS[1]}, square {STEPS[2]} steps", fontsize=10)
    left.legend(fontsize=7)
    edges = np.linspace(0, 1000, NUM_BANDS * 2 + 1)
    for index, (name, measured) in enumerate(found[STEPS[1]].items()):
        band = np.digitize(measured.timesteps, edges) - 1
        values = [np.median(measured.residuals[band == b]) for b in range(len(edges) - 1)]
        right.plot((edges[:-1] + edges[1:]) / 2, values, color=f"C{index}", marker=".", label=name)
    right.set(yscale="log", xlabel="timestep", ylabel="residual (median)")
    right.set_title(f"{STEPS[1]} steps", fontsize=10)
    plot.parent.mkdir(exist_ok=True)
    figure.savefig(plot, dpi=110)


def published_section(family: Family, pairs: Sequence[PreparedPair], plain: InversionSettings) -> str:
    """Make the section on the published timesteps."""
    published = [
        [f"{steps}", name, *measure_published(family, pairs, plain.model_copy(update={
            "timesteps": "published", "steps": steps, **options}))]
        for steps in (5, 10) for name, options in PUBLISHED.items()
    ]  # fmt: skip
    return f"""## Cost of the published timesteps

With `--timesteps published`, the first grid state at or above t (above the last node: the last one) is used as if it
were at t, and each step evaluates the model at the timestep where it starts. The table compares it with the state that
belongs to t: a trajectory over the same grid's nodes below t and then t, evaluated where steps end and solved to 1e-5,
for {TRAJECTORIES} draws of t per pair. "From below" is the share of states whose node is below t. The last two columns
are ratios, used states over states that belong to t: of the rms of tau, and of the rms of the noise predicted at t.

{
        table(
            (
                "grid steps",
                "solver",
                "node minus t, mean",
                "from below",
                "state error, median",
                "max",
                "ref_error, own state, median",
                "used state",
                "mean, own state",
                "used state",
                "tau",
                "predicted noise",
            ),
            published,
        )
    }"""


def write(name: str, pairs: Sequence[PreparedPair]) -> None:
    """Measure, draw, and write the page of a family."""
    family = load_family(str(MODELS[name]))
    flow = family.noise_schedule.prediction_type == FLOW
    plain = InversionSettings(prompt_dropout=0, hflip=False)
    solvers = SOLVERS | ({MIDPOINT: {"solver": "ddim"}} if flow else {})

    def run(title: str, **changes: Any) -> Measured:  # noqa: ANN401
        measured = measure(family, pairs, plain.model_copy(update=changes), midpoint=title == MIDPOINT)
        print(title, changes, measured.cells(own=True), flush=True)
        return measured

    found = {steps: {each: run(each, steps=steps, **options) for each, options in solvers.items()} for steps in STEPS}
    draw(found, IMAGES / f"{PAGES[name]}.png")
    reached = ("residual, median", "max", "round trip, median", "max", "noise ratio", "not converged")
    columns = ("evaluations a state", *reached)
    rows = [[each, f"{steps}", *found[steps][each].cells()] for steps in STEPS for each in solvers]
    narrow = [
        [dtype, each, *run(each, dtype=dtype, **options).cells(own=True)]
        for dtype in ("fp16", "bf16")
        for each, options in NARROW.items()
    ]
    guided = [[each, *run(each, guidance_scale=3.0, **SOLVERS[each]).cells()] for each in GUIDED]
    command = "python -m benchmarks.inversion.solvers" + (f" --family {name}" if flow else "")
    of_midpoint = (
        f"""
`{MIDPOINT}` is the explicit midpoint rule, the step of RF-Solver (arXiv 2411.04746): not a solver of the sampler's own
step, but a better integration of the flow. Its residual and round trip say how well it fits Euler's sampling."""
        if flow
        else ""
    )
    text = f"""{stamp(command, ("torch", "diffusers"), cores=1)}

![cost and accuracy of the solvers](images/{PAGES[name]}.png)

{len(pairs)} pairs, float32, jittered timesteps, guidance 1. "Not converged" is the share of states whose solver did not
reach its tolerance.{of_midpoint}

{table(("solver", "steps", *columns), rows)}

The same at {plain.steps} steps, with an inverting denoiser rounded to half precision. "Own residual" is what that
denoiser measures: its solver uses it, and shards store it. Residual and round trip are measured by the unrounded model,
in float32:

{table(("dtype", "solver", columns[0], "own residual, median", "max", *reached), narrow)}

The same in float32, with classifier-free guidance of scale 3 in the trajectory (an evaluation is then two forward
passes, both counted):

{table(("solver", *columns), guided)}"""
    published = "" if flow else f"\n\n{published_section(family, pairs, plain)}"
    write_page(RESULTS / f"{PAGES[name]}.md", TITLES[name], text + published)


def main() -> None:
    """Read the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--family", choices=PAGES, default="sd15", help="layout of the model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write(arguments.family, make_pairs(arguments.pairs))


if __name__ == "__main__":
    main()
