"""Compare models trained on different trajectories by their images; writes docs/results/trajectory_training.md.

The demo's pairs are inverted in several ways with the embedded world's model and with a copy that has a thin posterior
(made by benchmarks/toy_world/thin.py). On each set of shards SmPO is trained with three seeds and the demo's settings,
and evaluated on the test prompts under the true reward, against the model that it started from.

    python -m benchmarks.experiments.trajectory_training --work DIR [LABEL ...]

Six CPU minutes per variant. LABEL limits the work to some variants. The page lists finished variants, and names the
others. An interrupted stage continues.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from benchmarks.experiments.experiment import (
    BASE,
    COLUMNS,
    TRUTH,
    difference,
    evaluate,
    head,
    make_world,
    percent,
    pooled,
    results_of,
    row,
    run,
)
from benchmarks.page import IMAGES as PICTURES
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.inversion.advice import believable
from smpo_schemas.manifest import MANIFEST_FILE, BandHealth, read_manifest
from smpo_schemas.trained_model import TRAINING_FILE

mpl.use("Agg")
from matplotlib import pyplot as plt

PAGE, PLOT = RESULTS / "trajectory_training.md", PICTURES / "trajectory_training.png"
TITLE = "What trajectories do to a tuned model"
SEEDS = (0, 1, 2)
IMAGES = 4
TRAINING = (
    *("--reward", "pickscore", "clipscore", "--beta", 300, "--lr", "5e-5", "--lr-schedule", "cosine"),
    *("--warmup-steps", 10, "--batch-size", 24, "--max-steps", 150),
)
WORLDS = {"good": "The embedded world", "thin": "Its thin copy"}


@dataclass(frozen=True)
class Variant:
    """One way to make states."""

    world: str
    name: str
    flags: tuple[object, ...]

    @property
    def label(self) -> str:
        """Name of its folder of shards; its runs' names begin with it."""
        return f"{self.world}-{self.name}"


WAYS: dict[str, tuple[object, ...]] = {
    "forward": ("--source", "forward"),
    "ddim": ("--solver", "ddim"),
    "renoise-1": (),
    "renoise-5": ("--renoise-steps", 5),
    "anderson": ("--solver", "anderson"),
    "start-300": ("--start", 300),
    "steps-5": ("--steps", 5),
}
USED = {
    "good": ("forward", "ddim", "renoise-1", "anderson", "start-300", "steps-5"),
    "thin": ("forward", "ddim", "renoise-1", "renoise-5", "anderson", "start-300"),
}
VARIANTS = {
    variant.label: variant
    for world, names in USED.items()
    for name in names
    for variant in [Variant(world, name, WAYS[name])]
}


def model_of(work: Path, world: str) -> Path:
    """Folder of a world's model."""
    return work / ("world/model" if world == "good" else "thin")


def shards_of(work: Path, variant: Variant) -> Path:
    """Folder of a variant's shards."""
    return work / "trajectories" / variant.label


def runs_of(work: Path, variant: Variant) -> list[Path]:
    """Folders of a variant's trained models, one per seed."""
    return [work / "runs" / f"{variant.label}-s{seed}" for seed in SEEDS]


def invert(work: Path, world: str, out: Path, *flags: object) -> None:
    """Invert the demo's pairs with a world's model, unless that is done."""
    if not (out / MANIFEST_FILE).is_file():
        run(
            *("smpo-pipeline", "invert", "--pairs", work / "world/pairs", "--scores", work / "scores"),
            *("--model", model_of(work, world), "--out", out, "--concurrency", 2, *flags),
        )


def train(shards: Path, model: Path, out: Path, *flags: object) -> None:
    """Train a model with :data:`TRAINING`, unless that is done."""
    if not (out / TRAINING_FILE).is_file():
        run("smpo-train", "--shards", shards, "--model", model, "--out", out, *TRAINING, *flags)


def make(work: Path, variant: Variant) -> None:
    """Make a variant's shards and models."""
    invert(work, variant.world, shards_of(work, variant), *variant.flags)
    for seed, out in zip(SEEDS, runs_of(work, variant), strict=True):
        train(shards_of(work, variant), model_of(work, variant.world), out, "--seed", seed)


def judge(work: Path, world: str) -> None:
    """Evaluate a world's finished models."""
    runs = [out for variant in finished(work, world) for out in runs_of(work, variant)]
    evaluate(work / f"report-{world}", model_of(work, world), runs, work / "world/prompts/test.txt", images=IMAGES)


def finished(work: Path, world: str) -> list[Variant]:
    """A world's variants whose models are all trained."""
    return [
        variant
        for variant in VARIANTS.values()
        if variant.world == world and all((out / TRAINING_FILE).is_file() for out in runs_of(work, variant))
    ]


def bands_of(work: Path, variant: Variant) -> list[BandHealth]:
    """Health of a variant's trajectories, as `invert` measured it."""
    return read_manifest(shards_of(work, variant)).health


def cells(variant: Variant, bands: list[BandHealth]) -> str:
    """Format the first cells of a variant's row: its name and its trajectories' health."""
    if variant.name == "forward":
        return "forward | 1 by construction | - | "
    ratios = " ".join("-" if band.noise_ratio is None else f"{band.noise_ratio:.2f}" for band in bands)
    residuals = [band.residual for band in bands if band.residual is not None]
    warns = not all(believable(band) for band in bands)
    return f"{variant.name} | {ratios} | {max(residuals):.0e} | {'yes' if warns else ''}"


def furthest(bands: list[BandHealth]) -> float:
    """The noise ratio that is furthest from 1."""
    return max((band.noise_ratio for band in bands if band.noise_ratio), key=lambda ratio: abs(math.log(ratio)))


def draw(work: Path) -> None:
    """Plot the gain over the noise ratio of the worst band."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for axis, world in zip(axes, WORLDS, strict=True):
        for variant in finished(work, world):
            found, _ = pooled(work / f"report-{world}", [out.name for out in runs_of(work, variant)])
            mean = found.mean_difference
            ratio = 1.0 if variant.name == "forward" else furthest(bands_of(work, variant))
            reach = [[mean.value - (mean.low or 0)], [(mean.high or 0) - mean.value]]
            axis.errorbar([ratio], [mean.value], yerr=reach, fmt="o", capsize=3)
            axis.annotate(variant.name, (ratio, mean.value), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.margins(x=0.25)
        axis.set(title=WORLDS[world], xlabel="noise ratio furthest from 1")
    axes[0].set_ylabel("gain in true reward, 95 %")
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)


def table(work: Path, world: str) -> str:
    """Make a world's table."""
    report = work / f"report-{world}"
    lines = [
        row(report, cells(variant, bands_of(work, variant)), [out.name for out in runs_of(work, variant)])
        for variant in finished(work, world)
    ]
    base = results_of(report).finding(BASE, TRUTH).mean
    default = VARIANTS[f"{world}-renoise-1"]
    against = [
        f"| {variant.name} | {percent(found)} | {difference(found)} |"
        for variant in finished(work, world)
        if variant != default
        for found, _ in [pooled(report, *([out.name for out in runs_of(work, each)] for each in (variant, default)))]
    ]
    return (
        f"## {WORLDS[world]}, trained\n\nThe base's mean true reward is {base:.3f}.\n\n"
        f"{head('states', 'noise ratio', 'largest residual', 'warns', *COLUMNS)}\n"
        + "\n".join(lines)
        + "\n\nCompared with `renoise-1`, image by image and seed by seed:\n\n"
        + f"{head('states', 'win rate % (95 %)', 'difference (95 %)')}\n"
        + "\n".join(against)
    )


def write(work: Path) -> None:
    """Draw, and write the page."""
    draw(work)
    results = results_of(work / "report-good")
    tables = "\n\n".join(table(work, world) for world in WORLDS)
    missing = sorted(set(VARIANTS) - {variant.label for world in WORLDS for variant in finished(work, world)})
    missing_line = f"\n\nNot run: {', '.join(missing)}." if missing else ""
    text = f"""{stamp("python -m benchmarks.experiments.trajectory_training", ("torch", "diffusers", "numpy"), cores=1)}

All models are trained as in the demo, on its 600 pairs: SmPO with two rewards, beta 300, 150 steps of 24 pairs, lr 5e-5
(cosine, 10 warm-up steps). These settings were chosen on the validation prompts for `renoise-1` on the embedded world
([objectives.md](objectives.md)) and for no other variant, so they favour it if any. Three training seeds are pooled,
with {results.num_images} images of {results.num_prompts} test prompts per model at guidance 1. Intervals are 95 %
bootstraps over prompts; they do not cover the choice of training seeds, so each seed's win rate is listed too. The
noise ratio by timestep band (0 to 199 first) and the largest residual of a band are from the manifest.

![gain in true reward over the noise ratio of the worst band](images/trajectory_training.png)

{tables}{missing_line}"""
    write_page(PAGE, TITLE, text)


def main() -> None:
    """Make some variants, or all and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="*", metavar="LABEL", help=", ".join(VARIANTS))
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder for world, shards, runs and reports")
    arguments = parser.parse_args()
    work: Path = arguments.work
    if unknown := [label for label in arguments.labels if label not in VARIANTS]:
        parser.error(f"no such variant: {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    make_world(work)
    chosen = [VARIANTS[label] for label in arguments.labels] or list(VARIANTS.values())
    for world in dict.fromkeys(variant.world for variant in chosen):
        if not (model_of(work, world) / "model_index.json").is_file():
            parser.error(f"{work}/thin is not there: python -m benchmarks.toy_world.thin --out {work}/thin")
    for variant in chosen:
        make(work, variant)
    for world in dict.fromkeys(variant.world for variant in chosen):
        judge(work, world)
    if all(finished(work, world) for world in WORLDS):
        write(work)


if __name__ == "__main__":
    main()
