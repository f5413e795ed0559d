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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from benchmarks.inversion.solving import TRAJECTORIES, Measured, make_pairs, measure, measure_published
from benchmarks.page import IMAGES, RESULTS, stamp, write_page
from smpo_models.family import Family
from smpo_models.loading import load_family
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.health import NUM_BANDS
from smpo_pipeline.toy.create import MODELS
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
GUIDED = ("renoise 1 (published)", "renoise 5", "adaptive 1e-4", "anderson 1e-4")


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
