"""How far trajectories move in training, and whether a second round pays: writes docs/results/drift.md.

Shards hold states of the model that inverted the images, the base. First, models tuned for 50, 200 and 1000 steps
invert the same pairs with the same random draws, and the noise is compared. Second, the models that
trajectory_training.py trained on `renoise-1` are trained for as many steps again: on the shards of the first round, on
shards that the base inverted with other draws, and on shards that the tuned model inverted (`invert
--inverting-unet`), also with other draws. The reference is always the base.

    python -m benchmarks.experiments.trajectory_training --work DIR good-renoise-1
    python -m benchmarks.experiments.drift --work DIR [PART ...]

About twenty CPU minutes. PART limits the work: a number of steps (50, 200, 1000), shards and seed of the second
round (old-0, redrawn-0, fresh-0, ...), or page. The page shows the parts that exist. An interrupted stage continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.experiments.experiment import (
    BASE,
    COLUMNS,
    TRUTH,
    difference,
    evaluate,
    head,
    percent,
    pooled,
    results_of,
    row,
)
from benchmarks.experiments.trajectory_training import (
    IMAGES,
    SEEDS,
    VARIANTS,
    invert,
    model_of,
    runs_of,
    shards_of,
    train,
)
from benchmarks.page import RESULTS, stamp, write_page
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import Sample
from smpo_schemas.trained_model import TRAINING_FILE

PAGE = RESULTS / "drift.md"
TITLE = "Drift, and a second round"
AFTER = (50, 200, 1000)
BATCH = 8
PAIRS = 64
BANDS = 5
FIRST = VARIANTS["good-renoise-1"]
ARMS = {
    "old": "the first round's shards",
    "redrawn": "inverted again by the base",
    "fresh": "inverted again by the tuned model",
}


def tuned_for(work: Path, steps: int) -> Path:
    """Folder of the model that is trained for that many steps, at a constant learning rate."""
    return work / "runs" / f"drift-{steps}"


def inverted_by(work: Path, steps: int) -> Path:
    """Folder of the tuned model's trajectories of the first pairs."""
    return work / "trajectories" / f"drift-{steps}"


def make_moved(work: Path, steps: int) -> None:
    """Tune a model for some steps, and invert with it, with the base's random draws."""
    out = tuned_for(work, steps)
    flags = ("--lr-schedule", "constant", "--batch-size", BATCH, "--max-steps", steps)
    train(shards_of(work, FIRST), model_of(work, "good"), out, *flags)
    invert(work, "good", inverted_by(work, steps), "--limit", PAIRS, "--inverting-unet", out / "unet")


def second(work: Path, arm: str, seed: int) -> Path:
    """Folder of a model of the second round."""
    return work / "runs" / f"second-{arm}-s{seed}"


def make_second(work: Path, arm: str, seed: int) -> None:
    """Train the second round of one seed in one arm."""
    first = runs_of(work, FIRST)[SEEDS.index(seed)]
    shards = {
        "old": shards_of(work, FIRST),
        "redrawn": work / "trajectories/second-redrawn",
        "fresh": work / f"trajectories/second-fresh-s{seed}",
    }[arm]
    if arm != "old":
        invert(work, "good", shards, "--seed", 1, *(("--inverting-unet", first / "unet") if arm == "fresh" else ()))
    flags = ("--unet", first / "unet", "--seed", 10 + seed)
    train(shards, model_of(work, "good"), second(work, arm, seed), *flags)


def is_trained(out: Path) -> bool:
    """Whether a training is finished."""
    return (out / TRAINING_FILE).is_file()


def judge(work: Path) -> None:
    """Evaluate all finished models."""
    tuned = [tuned_for(work, steps) for steps in AFTER]
    runs = [*runs_of(work, FIRST), *tuned, *(second(work, arm, seed) for arm in ARMS for seed in SEEDS)]
    there = [out for out in runs if is_trained(out)]
    evaluate(work / "report-drift", model_of(work, "good"), there, work / "world/prompts/test.txt", images=IMAGES)


def trajectories_in(folder: Path, pairs: int) -> dict[str, Sample]:
    """Read the first trajectories of a folder of shards, by pair."""
    samples = (sample for sample, _ in zip(ShardDirectory(folder).samples(), range(pairs), strict=False))
    return {sample.meta.pair_id: sample for sample in samples}


def moved(base: Sequence[Sample], tuned: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Compare two sets of trajectories by timestep band: rms of tau's difference over tau's rms, and the correlation.

    Raises:
        RuntimeError: the trajectories are not of the same draws.
    """
    sums = np.zeros((BANDS, 4))
    for one, other in zip(base, tuned, strict=True):
        if not (one.x0_2Chw.equal(other.x0_2Chw) and one.timestep_K.equal(other.timestep_K)):
            raise RuntimeError(f"{one.meta.pair_id}: the trajectories begin elsewhere or visit other timesteps")
        for t, a, b in zip(one.timestep_K.tolist(), one.noise_K2Chw.double(), other.noise_K2Chw.double(), strict=True):
            x, y = a.numpy(), b.numpy()
            sums[t * BANDS // 1000] += ((x - y) ** 2).sum(), (x**2).sum(), (y**2).sum(), (x * y).sum()
    distance, squared, other_squared, product = sums.T
    return list(np.sqrt(distance / squared)), list(product / np.sqrt(squared * other_squared))


def moved_row(work: Path, steps: int) -> str:
    """Make a row of the first table."""
    tuned = trajectories_in(inverted_by(work, steps), PAIRS)
    base = trajectories_in(shards_of(work, FIRST), PAIRS)
    distances, correlations = moved([base[pair] for pair in tuned], list(tuned.values()))
    health = ShardDirectory(inverted_by(work, steps)).manifest.health
    ratios = " ".join(f"{band.noise_ratio:.2f}" for band in health if band.noise_ratio is not None)
    found, _ = pooled(work / "report-drift", [tuned_for(work, steps).name])
    return (
        f"| {steps} | {difference(found)} | {' '.join(f'{each:.2f}' for each in distances)} | "
        f"{' '.join(f'{each:.2f}' for each in correlations)} | {ratios} |"
    )


def moved_table(work: Path) -> str:
    """Make the first table."""
    made = [steps for steps in AFTER if is_trained(tuned_for(work, steps))]
    if not made:
        return "How far trajectories move was not measured."
    return f"""The table compares the tuned model's own trajectories with those of the base, with the same random draws:
{PAIRS} pairs of the embedded world, by timestep band (0 to 199 first). Training is that of
[trajectory_training.md](trajectory_training.md), but at a constant learning rate, with {BATCH} pairs per step and one
seed. "Noise ratio" is the *reference's* at the tuned model's trajectories.

{head("steps", "gain over base (95 %)", "rms of tau's difference / rms of tau", "correlation of tau", "noise ratio")}
{chr(10).join(moved_row(work, steps) for steps in made)}"""


def write(work: Path) -> None:
    """Write the page from all finished models."""
    judge(work)
    report = work / "report-drift"
    first = [out.name for out in runs_of(work, FIRST)]
    outs = {arm: [second(work, arm, seed) for seed in SEEDS] for arm in ARMS}
    arms = {arm: [out.name for out in of_arm] for arm, of_arm in outs.items() if all(map(is_trained, of_arm))}
    rows = [row(report, "after the first round", first)]
    rows += [row(report, f"second round: {ARMS[arm]}", of_arm) for arm, of_arm in arms.items()]
    names = {"first": first} | arms
    against = [
        f"| {ARMS[arm]} | {ARMS.get(other, 'after the first round')} | {percent(found)} | {difference(found)} |"
        for arm, other in (
            ("old", "first"),
            ("fresh", "first"),
            ("fresh", "old"),
            ("fresh", "redrawn"),
            ("redrawn", "old"),
        )
        if arm in names and other in names
        for found, _ in [pooled(report, names[arm], names[other])]
    ]
    results = results_of(report)
    not_made = [ARMS[arm] for arm in ARMS if arm not in arms]
    missing = f"\n\nNot run: the second round on shards {', '.join(not_made)}." if not_made else ""
    text = f"""{stamp("python -m benchmarks.experiments.drift", ("torch", "diffusers", "numpy"), cores=1)}

{moved_table(work)}

In the second round, the three models trained on `renoise-1` ([trajectory_training.md](trajectory_training.md)) are
trained for another 150 steps with the same settings (with a fresh optimizer, warm-up and schedule, and another order).
The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}; {results.num_images} images of
{results.num_prompts} test prompts per model.

{head("model", *COLUMNS)}
{chr(10).join(rows)}

Compared with each other, image by image and seed by seed:

{head("second round on shards", "against", "win rate % (95 %)", "difference (95 %)")}
{chr(10).join(against)}{missing}"""
    write_page(PAGE, TITLE, text)


def main() -> None:
    """Make some parts, or all and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to make; default: all")
    parser.add_argument(
        "--work", type=Path, default=Path("demo"), help="folder of benchmarks/experiments/trajectory_training.py"
    )
    arguments = parser.parse_args()
    work: Path = arguments.work
    parts: dict[str, Callable[[], None]] = {
        **{f"{steps}": lambda steps=steps: make_moved(work, steps) for steps in AFTER},
        **{f"{arm}-{seed}": lambda arm=arm, seed=seed: make_second(work, arm, seed) for arm in ARMS for seed in SEEDS},
        "page": lambda: write(work),
    }
    if unknown := [part for part in arguments.parts if part not in parts]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(parts)}")
    for part in arguments.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
