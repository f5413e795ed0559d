"""Compare `--beta auto` with fixed betas from the same starts; writes docs/results/auto_beta.md.

First, fixed betas on both embedded worlds, each with one training seed on the validation prompts:
which root mean square of the margins goes with which gain. The default of `--beta-band` is read from this table. Then,
on the world of Stable Diffusion's layout, three other seeds from each start, fixed and moved, on the test prompts.

    python -m benchmarks.experiments.auto_beta --work DIR

About an hour and a half of one core. An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks.experiments import flow_training
from benchmarks.experiments.experiment import BASE, COLUMNS, TRUTH, difference, gain, head, make_world, pooled, row, run
from benchmarks.experiments.objectives import SEEDS, SELECTION_SEED, Condition, judge, train
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results
from smpo_schemas.trained_model import METRICS_FILE
from smpo_trainer.loss_settings import LossOptions

REWARDS = ("--reward", "pickscore", "clipscore")
STARTS = (100, 1000, 10000, 30000)
STEPS, WARMUP, LR, BATCH = 150, 5, "5e-5", 24
TRAINING = (
    *("--max-steps", STEPS, "--batch-size", BATCH, "--warmup-steps", WARMUP),
    *("--lr", LR, "--lr-schedule", "cosine"),
)
FAMILIES = {
    "sd15": (TRAINING, (30, 100, 300, 1000, 3000, 10000)),
    "sd3": (flow_training.TRAINING, (10, 30, 100, 300, 1000, 3000)),
}
"""How each world's model is trained, and its fixed betas."""
IMAGES = {"validation": 2, "test": 4}
DEFAULTS = LossOptions()


def prepare(work: Path, family: str) -> Path:
    """Make a family's world and the states of its pairs; returns their folder."""
    out = work / family
    make_world(out, family)
    common = ("--pairs", out / "world/pairs", "--scores", out / "scores", "--model", out / "world/model")
    run("smpo-pipeline", "invert", *common, "--out", out / "shards")
    return out


def margins(model: Path, last: int | None = None) -> float:
    """Root mean square of the margins over a run after its warm-up, or over its last steps."""
    records = [json.loads(line) for line in (model / METRICS_FILE).read_text().splitlines()][WARMUP:]
    return float(np.sqrt(np.mean([record["rewards/margins_rms"] ** 2 for record in records[-(last or 0) :]])))


def band_section(work: Path, family: str) -> str:
    """Train with fixed betas on a family's world; makes the table of margins and gains."""
    condition = Condition("fixed", "renoise", REWARDS)
    training, betas = FAMILIES[family]
    models = [train(work, condition, beta, SELECTION_SEED, training) for beta in betas]
    results = judge(work, "report-band", models, "validation", IMAGES["validation"], 1)
    rows = [
        f"| {beta} | {margins(model):.2f} | {margins(model, 20):.2f} | {gain(results, model.name):+.3f} |"
        for beta, model in zip(betas, models, strict=True)
    ]
    return f"""### {family}

{head("beta", "margins, rms over the run", "over the last 20 steps", "gain")}
{chr(10).join(rows)}"""


def train_start(work: Path, start: int, seed: int, *, auto: bool) -> Path:
    """Train from a start, with beta fixed or moved."""
    if not auto:
        return train(work, Condition("fixed", "renoise", REWARDS), start, seed, TRAINING)
    out = work / "runs" / f"auto-from-{start}-s{seed}"
    flags = (*REWARDS, "--beta", f"auto:{start}", "--seed", seed, *TRAINING)
    run("smpo-train", "--shards", work / "shards", "--model", work / "world/model", "--out", out, *flags)
    return out


def last_beta(model: Path) -> float:
    """Beta of a run's last step."""
    return float(json.loads((model / METRICS_FILE).read_text().splitlines()[-1])["beta"])


def spread(results: Results, groups: list[list[Path]]) -> float:
    """Largest minus smallest mean true reward of the starts, each over its seeds."""
    means = [np.mean([results.finding(model.name, TRUTH).mean for model in group]) for group in groups]
    return float(max(means) - min(means))


def start_section(work: Path) -> str:
    """Train from each start with beta fixed and moved; makes the tables of the test prompts."""
    ways = {
        name: {start: [train_start(work, start, seed, auto=name == "auto") for seed in SEEDS] for start in STARTS}
        for name in ("fixed", "auto")
    }
    flat = [model for groups in ways.values() for group in groups.values() for model in group]
    report = work / "report-starts"
    results = judge(work, report.name, flat, "test", IMAGES["test"], 1)
    rows = [
        row(report, f"{start} | {name}", [model.name for model in group])
        for start in STARTS
        for name, groups in ways.items()
        for group in [groups[start]]
    ]
    compared = []
    for start in STARTS:
        names = [[model.name for model in ways[name][start]] for name in ("auto", "fixed")]
        ends = ", ".join(f"{last_beta(model):.0f}" for model in ways["auto"][start])
        compared.append(f"| {start} | {ends} | {difference(pooled(report, *names)[0])} |")
    spreads = {name: spread(results, list(groups.values())) for name, groups in ways.items()}
    return f"""The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each row pools {len(SEEDS)}
training seeds, {results.num_images} images of {results.num_prompts} prompts each:

{head("start", "beta", *COLUMNS)}
{chr(10).join(rows)}

{head("start", "last betas of auto, each seed", "auto minus fixed, true reward (95 %)")}
{chr(10).join(compared)}

Between the starts with the largest and the smallest mean true reward there is {spreads["fixed"]:.3f} with fixed betas,
and {spreads["auto"]:.3f} with moved ones."""


def write(bands: list[str], starts: str, target: Path) -> None:
    """Write the page."""
    text = f"""{stamp("python -m benchmarks.experiments.auto_beta", ("torch", "diffusers", "transformers", "numpy"))}

SmPO on the embedded worlds' 600 pairs with pickscore and clipscore, ReNoise states, all weights trained: {STEPS} steps
of {BATCH} pairs at lr {LR} on the world of Stable Diffusion's layout (sd15), {flow_training.STEPS} steps at lr
{flow_training.LR} on the flow model of Stable Diffusion 3's (sd3). `auto` is `--beta auto:START` with the default band
({DEFAULTS.beta_band}) and rate ({DEFAULTS.beta_rate:g}), from step {WARMUP + 1} on. Images are drawn by 16 steps at
guidance 1, by each model from the same noise. Intervals are 95 % bootstraps over prompts (a prompt's images, of all
seeds, belong together).

## From each start, test prompts

{starts}

## Which margins go with a gain

Fixed betas, one training seed ({SELECTION_SEED}), gain in mean true reward on {IMAGES["validation"]} images of each
validation prompt.

{(chr(10) * 2).join(bands)}
"""
    write_page(target, "Does `--beta auto` help?", text)


def main() -> None:
    """Run both parts and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for worlds, shards, runs and reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "auto_beta.md", help="page to write")
    arguments = parser.parse_args()
    folders = {family: prepare(arguments.work, family) for family in FAMILIES}
    bands = [band_section(folder, family) for family, folder in folders.items()]
    print("\n\n".join(bands), flush=True)
    write(bands, start_section(folders["sd15"]), arguments.out)


if __name__ == "__main__":
    main()
