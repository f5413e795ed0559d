"""Measure the noise ratios of trajectories on two worlds; writes docs/results/noise_ratio.md.

The same pairs, drawn by the embedded world's base model from held-out captions, are inverted with the world's own model
and with a copy that has a thin posterior (made by benchmarks/toy_world/thin.py), with every number of steps, solver and
start. The page lists the health that `invert` writes to its manifest, over all pairs, and whether it would warn.

    python -m benchmarks.toy_world.thin --out DIR
    python -m benchmarks.inversion.trajectories measure "the world" good.json
    python -m benchmarks.inversion.trajectories measure "its thin copy" thin.json --model DIR
    python -m benchmarks.inversion.trajectories page good.json thin.json

Three to four CPU minutes per world.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from benchmarks.page import IMAGES, RESULTS, stamp, write_page
from smpo_common.files import read_json, write_json
from smpo_models.family import Family
from smpo_models.loading import load_family
from smpo_pipeline.inversion.advice import HIGHEST_RATIO, LOWEST_RATIO, believable
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.isolation import Failure
from smpo_pipeline.toy.create import ASSETS
from smpo_pipeline.toy.sampling import load_pipeline, sample_images
from smpo_pipeline.toy.world import captions_of
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import BandHealth

mpl.use("Agg")
from matplotlib import pyplot as plt

PAGE, PLOT = RESULTS / "noise_ratio.md", IMAGES / "noise_ratio.png"
TITLE = "Noise ratios by solver, steps and start"

PAIRS_OF_STEPS = {5: 8, 9: 8, 20: 4, 50: 2}
"""Longer trajectories have more states per band, so fewer pairs suffice."""

SOLVERS: dict[str, dict[str, Any]] = {
    "ReNoise 0 (DDIM)": {"renoise_steps": 0},
    "ReNoise 1": {"renoise_steps": 1},
    "ReNoise 3": {"renoise_steps": 3},
    "ReNoise 5": {"renoise_steps": 5},
    "anderson": {"solver": "anderson"},
}
STARTS: tuple[str | int, ...] = ("clean", "level0", 100, 300)

Cell = tuple[int, str, str | int]
"""Steps, solver, start."""


def make_pairs(count: int) -> list[PreparedPair]:
    """Make pairs of two samples of the base model for one held-out caption, like the world's own pairs."""
    captions = captions_of("test")[:count]
    pipeline = load_pipeline(ASSETS / "model")
    images = [sample_images(pipeline, captions, list(range(image, 2 * count, 2))) for image in range(2)]
    nowhere = ((0, 0), (0, 0))
    return [
        PreparedPair(f"{number}", caption, None, None, {}, np.stack(both), nowhere, nowhere, measured=True)
        for number, (caption, *both) in enumerate(zip(captions, *images, strict=True))
    ]


def measure(family: Family, pairs: Sequence[PreparedPair], cell: Cell) -> list[BandHealth]:
    """Invert some pairs; returns the health of their trajectories by band."""
    steps, solver, start = cell
    settings = InversionSettings(steps=steps, start=start, prompt_dropout=0, hflip=False, **SOLVERS[solver])
    requests = [(pair, 0) for pair in pairs[: PAIRS_OF_STEPS[steps]]]
    samples, health = Inverter(family, family.denoiser, settings, 0).invert(requests)
    failed = [sample for sample in samples if isinstance(sample, Failure)]
    if failed:
        raise RuntimeError(f"{cell}: {failed[0].reason}")
    return health.bands(family.noise_schedule.num_train_timesteps)


def cells() -> Iterator[Cell]:
    """All combinations, in the order of the table."""
    yield from product(PAIRS_OF_STEPS, SOLVERS, STARTS)


def ratios(bands: Sequence[BandHealth]) -> list[float]:
    """Noise ratios of the bands that contain states."""
    return [band.noise_ratio for band in bands if band.noise_ratio is not None]


def worst(bands: Sequence[BandHealth]) -> float:
    """The noise ratio that is furthest from 1."""
    return max(ratios(bands), key=lambda ratio: abs(np.log(ratio)))


def warned(bands: Sequence[BandHealth]) -> bool:
    """Whether `invert` warns of the noise ratio (a solver's failures apart)."""
    return not all(believable(band) for band in bands)


def row(cell: Cell, bands: Sequence[BandHealth]) -> list[str]:
    """Format a table row, with the five bands in each column of measurements."""
    steps, solver, start = cell

    def numbers(values: Sequence[float | None], form: str) -> str:
        return " ".join("-" if value is None else format(value, form) for value in values)

    return [
        f"{steps}",
        solver,
        f"{start}",
        numbers([band.noise_ratio for band in bands], ".2f"),
        numbers([band.residual for band in bands], ".0e"),
        numbers([band.neighbour_correlation for band in bands], ".2f"),
        "yes" if warned(bands) else "",
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(found: dict[str, dict[Cell, list[BandHealth]]]) -> None:
    """Plot the worst band of every combination, on both worlds."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained", sharey=True)
    columns = list(product(PAIRS_OF_STEPS, STARTS))
    for axis, (name, of_cell) in zip(axes, found.items(), strict=True):
        values = np.array([[worst(of_cell[steps, solver, start]) for steps, start in columns] for solver in SOLVERS])
        image = axis.imshow(np.log2(values), cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            bad = not LOWEST_RATIO <= value <= HIGHEST_RATIO
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6.5, weight="bold" if bad else "normal")
        axis.set_xticks(range(len(columns)), [f"{steps} {start}" for steps, start in columns], rotation=90, fontsize=7)
        axis.set_yticks(range(len(SOLVERS)), SOLVERS, fontsize=8)
        axis.set_title(f"{name}: noise ratio of the worst band", fontsize=10)
        axis.set_xlabel("steps, start", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_ticks([-1, 0, 1], labels=["0.5", "1", "2"])
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def measure_world(name: str, model: str, target: Path) -> None:
    """Measure all combinations on one world, and write a JSON file."""
    torch.set_num_threads(1)
    begin = time.process_time()
    pairs = make_pairs(max(PAIRS_OF_STEPS.values()))
    family = load_family(model)
    pixels = torch.from_numpy(np.concatenate([pair.pixels_2HW3 for pair in pairs])).permute(0, 3, 1, 2)
    mean, std = family.posterior(pixels.float() / 127.5 - 1)
    found = {}
    for cell in cells():
        found[cell] = measure(family, pairs, cell)
        print(f"{time.process_time() - begin:5.0f} s", row(cell, found[cell]), flush=True)
    result = {
        "name": name,
        "spread": float(std.mean() / mean.std()),
        "seconds": time.process_time() - begin,
        "cells": [[*cell, [band.model_dump() for band in bands]] for cell, bands in found.items()],
    }
    write_json(target, result)


def write(files: Sequence[Path]) -> None:
    """Draw, and write the page."""
    worlds = [read_json(file) for file in files]
    found = {
        world["name"]: {(*cell,): [BandHealth(**band) for band in bands] for *cell, bands in world["cells"]}
        for world in worlds
    }
    draw(found)
    columns = ("steps", "solver", "start", "noise ratio", "residual", "neighbour correlation", "warns")
    tables = "\n\n".join(
        f"## {name[0].upper()}{name[1:]}\n\nThe posterior's standard deviation is {world['spread']:.2f} of that of "
        f"the latents' means.\n\n{table(columns, [row(*each) for each in of_cell.items()])}"
        for world, (name, of_cell) in zip(worlds, found.items(), strict=True)
    )
    used = ", ".join(f"{count} for {steps} steps" for steps, count in PAIRS_OF_STEPS.items())
    minutes = sum(world["seconds"] for world in worlds) / 60
    text = f"""{stamp("python -m benchmarks.inversion.trajectories", ("torch", "diffusers"), cores=1)}
Measured in {minutes:.0f} CPU minutes.

![noise ratio of the worst band](images/noise_ratio.png)

Each of the three columns of measurements lists the five timestep bands, 0 to 199 first. All runs use float32 and
jittered timesteps, without dropped prompts and flips. Pairs: {used}.
"warns": a band's noise ratio is outside {LOWEST_RATIO} to {HIGHEST_RATIO}. "-": no step was taken there, so there is no
residual.

{tables}"""
    write_page(PAGE, TITLE, text)


def main() -> None:
    """Measure one world, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("name")
    measuring.add_argument("target", type=Path)
    measuring.add_argument("--model", default=str(ASSETS / "model"))
    commands.add_parser("page").add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure_world(arguments.name, arguments.model, arguments.target)
    else:
        write(arguments.files)


if __name__ == "__main__":
    main()
