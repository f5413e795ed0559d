"""Compare what the trainer says of its runs with what their models draw; writes docs/results/health.md.

Runs with deliberate faults, and good ones of ten training seeds: the trainer's warnings and spikes, beside the gain in
a reward that a user would validate with and in the true reward, which nothing else sees.

    python -m benchmarks.experiments.health [--demo DIR] [--work DIR]

About half an hour of one core. Reads the demo's world, scores and shards (`make demo`). Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.experiments.experiment import TRUTH, gain, head, results_of, run
from benchmarks.page import RESULTS, ROOT, stamp, write_page
from smpo_pipeline.evaluation.results import Results
from smpo_schemas.scoring.scores import read_scores, read_scores_info, write_part, write_scores_info
from smpo_schemas.trained_model import METRICS_FILE, TRAINING_FILE
from smpo_trainer.safeguards.spikes import LAST_STEPS, USUAL_STEPS, error_ratio

COMMON = ("--batch-size", 24, "--warmup-steps", 10, "--val-every", 20, "--val-states", 256)
GOOD = ("--beta", 300, "--lr", "5e-5", "--lr-schedule", "cosine", "--max-steps", 150, "--val-fraction", 0.1)
DIVERGING = ("--beta", 300, "--lr", "5e-3", *GOOD[4:])
NOISIEST = ("--timestep-weighting", "sigmoid", "--sigmoid-bias", -8)
LAST = 20
"""Number of last steps in the means."""

SEEDS = range(10)
"""Of the good runs."""

IMAGES = 2
"""Of each validation prompt."""

VALIDATION_REWARD = "pickscore"


@dataclass(frozen=True)
class Condition:
    """One run.

    Attributes:
        name: of its folder.
        wrong: its fault, for the page.
        flags: besides :data:`COMMON`.
        shuffled: whether each pair's two scores are swapped at random.
    """

    name: str
    wrong: str
    flags: tuple[object, ...]
    shuffled: bool = False


HEALTHY = [
    Condition(f"good-{seed}", f"nothing: the demo's settings, seed {seed}", (*GOOD, "--seed", seed)) for seed in SEEDS
]
FAULTY = (
    Condition(
        "large-lr", "learning rate 60 times too large", ("--beta", 300, "--lr", "3e-3", "--max-steps", 50, *GOOD[-2:])
    ),
    Condition("diverging", "learning rate 100 times too large", DIVERGING),
    Condition(
        "rolled-back",
        "the same, with `--on-spike rollback`",
        (*DIVERGING, "--on-spike", "rollback", "--save-every", 20),
    ),
    Condition("small-beta", "beta 1 in place of 300", ("--beta", 1, *GOOD[2:-4], "--max-steps", 60, *GOOD[-2:])),
    Condition(
        "shuffled",
        "scores exchanged at random between a pair's images",
        (*GOOD[:-4], "--max-steps", 100, *GOOD[-2:]),
        shuffled=True,
    ),
    Condition(
        "few-prompts",
        "41 pairs (by their labels) in ten epochs, beta 3000, learning rate 3e-4",
        ("--objective", "dpo", "--beta", 3000, "--lr", "3e-4", "--max-steps", 160, "--val-fraction", 0.9),
    ),
    Condition(
        "one-band",
        "a timestep weighting that leaves only the noisiest states",
        ("--beta", 3000, *GOOD[2:-4], "--max-steps", 70, *GOOD[-2:], *NOISIEST),
    ),
)


def shuffle_scores(source: Path, target: Path) -> None:
    """Write a scores table in which a random half of the pairs have the scores of their images swapped."""
    info = read_scores_info(source)
    rows = read_scores(source, info).to_pylist()
    for row, swapped in zip(rows, np.random.default_rng(0).random(len(rows)) < 1 / 2, strict=True):
        for name in info.rewards if swapped else ():
            row[f"{name}_0"], row[f"{name}_1"] = row[f"{name}_1"], row[f"{name}_0"]
    target.mkdir(parents=True, exist_ok=True)
    part = write_part(target / "scores-000000.parquet", rows, list(info.rewards))
    write_scores_info(target, info.model_copy(update={"parts": [part]}))


def train(demo: Path, work: Path, condition: Condition) -> Path:
    """Train, unless the run exists; returns its folder."""
    out = work / condition.name
    scores = work / "shuffled-scores"
    if condition.shuffled:
        shuffle_scores(demo / "scores", scores)
    flags: Sequence[object] = (
        *("--shards", demo / "shards", "--model", demo / "world/model", "--out", out),
        *(() if "dpo" in condition.flags else ("--reward", "pickscore", "clipscore")),
        *(("--scores", scores) if condition.shuffled else ()),
        *(*COMMON, *condition.flags),
    )
    command = [sys.executable, "-m", "smpo_trainer", *map(str, flags)]
    print("$ smpo-train", " ".join(command[3:]), flush=True)
    subprocess.run(command, check=True)
    return out


def judge(demo: Path, work: Path, models: Sequence[Path]) -> Results:
    """Draw the validation prompts by each model; score them by the true reward and by one that a user would have."""
    out = work / "report"
    rewards = ("--reward", TRUTH, f"{VALIDATION_REWARD}={demo / 'world/rewards' / VALIDATION_REWARD}")
    run(
        *("smpo-pipeline", "evaluate", "--model", f"base={demo / 'world/model'}"),
        *(f"{model.name}={model}" for model in models),
        *("--prompts", demo / "world/prompts/validation.txt", "--images-per-prompt", IMAGES, "--sampler", "ddim"),
        *("--steps", 16, "--guidance-scale", 1, "--batch-size", 64, *rewards, "--out", out, "--overwrite"),
    )
    return results_of(out)


def read_records(out: Path) -> list[dict[str, float]]:
    """Read the metrics of a run."""
    return [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]


def row(condition: Condition, out: Path, results: Results) -> str:
    """Make the run's table row."""
    warnings = json.loads((out / TRAINING_FILE).read_text())["warnings"]
    last = read_records(out)[-LAST:]
    values = [
        np.mean([record[name] for record in last if record.get(name) is not None])
        for name in ("loss", "rewards/accuracies", "val/rewards/accuracies", "rewards/margins")
    ]
    seen = results.finding(out.name, VALIDATION_REWARD).versus_baseline
    gains = f"{seen.mean_difference.value:+.4f} | {gain(results, out.name):+.3f}" if seen else "- | -"
    numbers = " | ".join(f"{value:.3g}" for value in values)
    return f"| {condition.wrong} | {numbers} | {gains} | {'<br>'.join(warnings) or 'nothing'} |"


def largest_spike(out: Path) -> float:
    """Largest ratio to its usual value that the spike detector meets in a run."""
    ratios = [ratio for record in read_records(out) if (ratio := error_ratio(record)) is not None]
    span = range(1, len(ratios) - LAST_STEPS + 1)
    return max(min(ratios[at : at + LAST_STEPS]) / np.median(ratios[max(0, at - USUAL_STEPS) : at]) for at in span)


def main() -> None:
    """Train all runs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder of world, scores and shards")
    parser.add_argument("--work", type=Path, default=ROOT / "demo/health", help="folder for the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "health.md", help="page to write")
    arguments = parser.parse_args()
    runs = {each: train(arguments.demo, arguments.work, each) for each in (*HEALTHY, *FAULTY)}
    results = judge(arguments.demo, arguments.work, list(runs.values()))
    columns = head(
        *("fault", "loss", "accuracy", "held-out accuracy", "margin"),
        *(f"gain in {VALIDATION_REWARD}", "gain in the true reward", "the trainer's warnings"),
    )
    spikes = max(largest_spike(runs[each]) for each in HEALTHY)
    text = f"""{stamp("python -m benchmarks.experiments.health", ("torch", "diffusers", "numpy"))}

Each run trains on the embedded world's 600 pairs, with {COMMON[1]} pairs per step and {COMMON[3]} warm-up steps.
Numbers are means over the last {LAST} steps (held-out accuracy: over the evaluations within them). Gains are those of
the mean reward over the base's, on {results.num_images} images of {results.num_prompts} validation prompts by 16 DDIM
steps at guidance 1, from the same noise: in {VALIDATION_REWARD}, which a user could validate with
(`--validation-reward`), and in the true reward, which nothing else sees.

## Runs with one deliberate fault

{columns}
{chr(10).join(row(each, runs[each], results) for each in FAULTY)}

## Good runs

{columns}
{chr(10).join(row(each, runs[each], results) for each in HEALTHY)}

Over 3 steps the error's ratio to the reference's rises to {spikes:.2f} times its median of the {USUAL_STEPS} steps
before at most; `--spike-ratio` is 2 by default.

A rule about both images' errors rising together was removed after the runs of 2026-11: it warned of runs that gained
most under the true reward ([drift.md](drift.md)).
"""
    write_page(arguments.out, "Which of the trainer's warnings deserve belief?", text)


if __name__ == "__main__":
    main()
