"""Compare the options that keep a preferred image from getting worse; writes docs/results/safeguards.md.

SmPO and Diffusion-DPO as they are, SmPO with `--winner-preserving` and with `--norm-guard`, and Linear-DPO, on the
embedded world. For each, settings are chosen on the validation prompts with a training seed of its own, then three
other seeds are evaluated on the test prompts under the true reward, which nothing else sees.

    python -m benchmarks.experiments.safeguards --work DIR

About an hour of one core. An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.experiments.experiment import (
    BASE,
    COLUMNS,
    TRUTH,
    comparison_row,
    head,
    make_world,
    row,
    run,
)
from benchmarks.experiments.objectives import SEEDS, judge, train
from benchmarks.experiments.settings import Setting, choose, describe, make_settings, tried_section
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results
from smpo_schemas.trained_model import METRICS_FILE

REWARDS = ("--reward", "pickscore", "clipscore")
STEPS, LR, BATCH = 100, "5e-5", 24
TRAINING = (
    *("--max-steps", STEPS, "--batch-size", BATCH, "--warmup-steps", 5),
    *("--lr", LR, "--lr-schedule", "cosine"),
)
IMAGES = 4
"""Of each test prompt; half as many of each validation prompt."""

WAYS = {
    "smpo": make_settings("smpo", (100, 300), [REWARDS]),
    "winner-preserving": make_settings(
        "winner-preserving", (100, 300), [(*REWARDS, "--winner-preserving", mu) for mu in ("0", "0.5")]
    ),
    "norm-guard": make_settings(
        "norm-guard", (100, 300), [(*REWARDS, "--norm-guard", weight) for weight in ("0.1", "1")]
    ),
    "dpo": make_settings("dpo", (100, 300), [("--objective", "dpo")]),
    "linear-dpo": make_settings("linear-dpo", (100, 300, 1000), [("--objective", "linear-dpo")]),
}
AGAINST = {"winner-preserving": "smpo", "norm-guard": "smpo", "linear-dpo": "dpo"}


def prepare(work: Path) -> None:
    """Make the world and the states of its pairs."""
    make_world(work)
    common = ("--pairs", work / "world/pairs", "--scores", work / "scores", "--model", work / "world/model")
    run("smpo-pipeline", "invert", *common, "--out", work / "shards")


def last(models: list[Path], name: str, steps: int = 20) -> float:
    """Mean of a metric over the last steps of several runs."""
    records = [
        json.loads(line) for model in models for line in (model / METRICS_FILE).read_text().splitlines()[-steps:]
    ]
    return float(np.mean([record[name] for record in records]))


def write(work: Path, chosen: dict[str, Setting], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    models = {way: [train(work, *setting, seed, TRAINING) for seed in SEEDS] for way, setting in chosen.items()}
    report = work / "report-safeguards-test"
    results = judge(work, report.name, [model for group in models.values() for model in group], "test", IMAGES, 1)
    rows = [row(report, f"{way}: {describe(chosen[way])}", [it.name for it in group]) for way, group in models.items()]
    compared = [comparison_row(report, models, way, other) for way, other in AGAINST.items()]
    moved = [
        f"| {way} | {last(group, 'norm_growth'):+.4f} | {last(group, 'error_minus_reference/chosen'):+.5f} "
        f"| {last(group, 'error_minus_reference/rejected'):+.5f} |"
        for way, group in models.items()
    ]
    text = f"""{stamp("python -m benchmarks.experiments.safeguards", ("torch", "diffusers", "transformers", "numpy"))}

The embedded world's 600 pairs, ReNoise states; {STEPS} steps of {BATCH} pairs, lr {LR}, all weights trained. SmPO
learns from pickscore and clipscore, DPO and Linear-DPO from the annotators' labels. Images are drawn by 16 DDIM steps,
by each model from the same noise. Intervals are 95 % bootstraps over prompts (a prompt's images, of all seeds, belong
together); they do not cover the choice of training seeds, so each seed's win rate is listed too.

## Test prompts, guidance 1

The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each way pools {len(SEEDS)} training seeds,
{results.num_images} images of {results.num_prompts} prompts each:

{head("way: settings", *COLUMNS)}
{chr(10).join(rows)}

{head("compared, seed by seed", "win rate % (95 %)", "difference of the true reward (95 %)")}
{chr(10).join(compared)}

## What moved

Means of the last 20 steps: how far the norms of the model's outputs are above the reference's, and the errors minus
the reference's.

{head("way", "growth of norms", "preferred image's error", "other image's error")}
{chr(10).join(moved)}

{tried_section(selection, WAYS)}
"""
    write_page(target, "Options that protect the preferred image, on the embedded world", text)


def main() -> None:
    """Run all ways and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, shards, runs and reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "safeguards.md", help="page to write")
    arguments = parser.parse_args()
    prepare(arguments.work)
    chosen, selection = choose(arguments.work, WAYS, TRAINING, IMAGES // 2, report="report-safeguards-selection")
    write(arguments.work, chosen, selection, arguments.out)


if __name__ == "__main__":
    main()
