"""Measure rewards and mixes against the true mix of annotators of the embedded world.

Writes docs/results/calibration.md and its picture.

The world's annotators are code: the exact probability that one of them, drawn at random, prefers image_0 is known.
`smpo-pipeline calibrate` sees one label per pair; its held-out predictions are also compared with that probability.

    python -m benchmarks.experiments.pairs.calibration [--work DIR]

About five minutes on two cores, most of them to sample the world. Every stage continues where it was stopped.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.page import IMAGES, RESULTS, ROOT, stamp, write_page
from smpo_pipeline.calibration.calibrate import CalibrationResult, calibrate
from smpo_pipeline.calibration.cross_validation import COIN
from smpo_pipeline.calibration.measures import agreement, calibration_error, log_loss, reliability
from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.toy.annotators import ANNOTATORS, expected_label
from smpo_schemas.pairs import Pair, RowRange, layouts_of, list_pair_files, read_rows

NUM_PAIRS = 1200
SEEDS = range(5)
NUM_RESAMPLES = 2000
COMMAND = "smpo-pipeline calibrate --scores scores"


def run(program: str, *arguments: object) -> None:
    """Run a command of this project, as a user does."""
    command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def prepare(work: Path) -> None:
    """Make world, scores, and the calibration, as a user does."""
    run("smpo-pipeline", "toy", "--out", work / "world", "--pairs", NUM_PAIRS)
    rewards = [f"{name}={work / 'world/rewards' / name}" for name in ("pickscore", "clipscore")]
    run("smpo-pipeline", "score", "--pairs", work / "world/pairs", "--out", work / "scores", "--reward", *rewards)
    run("smpo-pipeline", "calibrate", "--scores", work / "scores", "--out", work / "calibration.json")


def true_mix(work: Path, report: CalibrationResult) -> np.ndarray:
    """Mean P(image_0 preferred) over all annotators, for each row of the scores: float64 [P]."""
    pairs: dict[str, Pair] = {}
    files = list_pair_files([work / "world/pairs"])
    for path, layout in layouts_of(files).items():
        for _, pair in read_rows(RowRange(path, 0, sys.maxsize), layout):
            if not isinstance(pair, Pair):
                raise pair
            pairs[pair.pair_id] = pair
    ordered = [pairs[pair_id] for pair_id in report.data.pair_ids]
    images = [
        [np.asarray(decode_image(data)) for data in side]
        for side in zip(*((p.image_0, p.image_1) for p in ordered), strict=True)
    ]
    return expected_label(*images, [pair.prompt for pair in ordered])


def losses(p_P: np.ndarray, true_P: np.ndarray) -> np.ndarray:
    """Cross-entropy of each pair, in nats."""
    return -true_P * np.log(p_P) - (1 - true_P) * np.log1p(-p_P)


def interval(difference_P: np.ndarray, prompts: list[str]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean difference, prompts drawn with all their pairs."""
    _, prompt_P = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(prompt_P, difference_P), np.bincount(prompt_P)
    drawn = np.random.default_rng(0).integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def rows(report: CalibrationResult, true_P: np.ndarray) -> list[str]:
    """Make a table row for each reward and mix."""
    chosen = report.held_out.chosen
    own = losses(report.held_out.p[chosen], true_P)
    found = []
    for name, p_P in report.held_out.p.items():
        each = losses(p_P, true_P)
        low, high = interval(each - own, list(report.data.prompts))
        against = "" if name == chosen else f"{np.mean(each - own):+.4f} ({low:+.4f} .. {high:+.4f})"
        fit = report.calibration.held_out[name]
        alike, decided = agreement(p_P, true_P)
        errors = (
            ("-", "-")
            if name == COIN
            else (f"{calibration_error(reliability(p_P, true_P)):.3f}", f"{fit.calibration_error:.3f}")
        )
        orders = ("-", "-") if name == COIN else (f"{100 * alike / decided:.1f}", f"{100 * (fit.agreement or 0):.1f}")
        label = f"**{name}**" if name == chosen else name
        cells = (
            label,
            f"{each.mean():.4f}",
            against,
            errors[0],
            orders[0],
            f"{fit.log_loss:.4f}",
            errors[1],
            orders[1],
        )
        found.append(f"| {' | '.join(cells)} |")
    return found


def over_seeds(work: Path, true_P: np.ndarray) -> list[str]:
    """Make a table row for each assignment of prompts to folds: the mixture and the best of the others."""
    found = []
    for seed in SEEDS:
        report = calibrate(work / "scores", [], folds=5, seed=seed)
        mean = {name: float(losses(p_P, true_P).mean()) for name, p_P in report.held_out.p.items()}
        others = {
            name: loss for name, loss in mean.items() if not name.startswith("mixture") and "calibrated" not in name
        }
        best = min(others, key=others.__getitem__)
        chosen = report.held_out.chosen
        found.append(f"| {seed} | {chosen} | {mean[chosen]:.4f} | {best} | {others[best]:.4f} |")
    return found


def main() -> None:
    """Make the world, evaluate, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "demo" / "calibration")
    work = parser.parse_args().work
    prepare(work)
    report = calibrate(work / "scores", [], folds=5, seed=0)
    true_P = true_mix(work, report)
    found = report.calibration
    mixed = ", ".join(f"{name} {each.weight:.2f} (tau {each.tau:.3f})" for name, each in found.rewards.items())
    columns = ("held out", "log-loss, true mix", "less the mixture's (95 %)", "ECE, true mix", "orders as true mix %")
    floor = log_loss(true_P, true_P), log_loss(true_P, report.data.labels_P)
    labels = ("log-loss, labels", "ECE, labels", "agrees with labels %")
    text = f"""{stamp("python -m benchmarks.experiments.pairs.calibration", ("torch", "numpy", "transformers"))}

{NUM_PAIRS} pairs of {found.prompts} prompts, each labelled once by one of {len(ANNOTATORS)} annotators with different
tastes ({found.labels - found.ties} decided labels, {found.ties} ties). `{COMMAND}`
fits on four fifths of the prompts and predicts the rest, in turn. It sees only the labels.

The **true mix** is the exact probability that an annotator drawn at random prefers image_0 (a tie counts half),
computed in code from the images. Log-loss is the mean cross-entropy in nats: p = 0.5 scores ln 2 = 0.6931. The true mix
scores {floor[0]:.4f} against itself and {floor[1]:.4f} against the labels; a lower value can only be chance.
Single rewards and `minmax` without "fitted" are what `smpo-train` does by default: their scale is the data set's
minimum and maximum. Intervals are 95 % bootstraps over prompts.

| {" | ".join((*columns, *labels))} |
{"|---" * (len(columns) + len(labels))}|
{chr(10).join(rows(report, true_P))}

In bold is the mixture that is written ({found.weights} weights, which had the lower held-out log-loss by the labels):
{mixed}.

![Reliability of each reward and mix, log-loss, agreement by annotator](images/calibration.png)

Other assignments of the prompts to folds: the mixture, and the best of the single rewards, the min-max mixes and the
uncalibrated win rate, by log-loss against the true mix:

| seed of the folds | mixture | log-loss | best other | log-loss |
|---|---|---|---|---|
{chr(10).join(over_seeds(work, true_P))}
"""
    shutil.copyfile(work / "calibration.png", IMAGES / "calibration.png")
    write_page(RESULTS / "calibration.md", "Calibrated rewards on the embedded world", text)


if __name__ == "__main__":
    main()
