"""Guide the embedded world's model away from a negative one, trained by `npo`; writes docs/results/negative.md.

The negative models learn the reversed labels of the world's pairs. Beta is chosen on the validation prompts at guidance
4 with a training seed of its own; then three other seeds are evaluated on the test prompts at several guidance scales
under the true reward: the base with the negative model in place of its own unconditional prediction, against the base.

    python -m benchmarks.experiments.negative --work DIR

An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.experiments.experiment import BASE, COLUMNS, TRUTH, head, make_world, row, run
from benchmarks.experiments.objectives import (
    BATCH,
    LR,
    SEEDS,
    STEPS,
    TRAINING,
    Condition,
    choice_section,
    choose_betas,
    judge,
    train,
)
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results

NEGATIVE = Condition("npo", "undropped", ("--objective", "npo"))
BETAS = (30, 100, 300)
CHOSEN_AT = 4
GUIDANCES = (2, 4, 7)
IMAGES = 4


def prepare(work: Path) -> None:
    """Make the world and states of its pairs, with the prompts of all, as Diffusion-NPO has them."""
    make_world(work)
    common = ("--pairs", work / "world/pairs", "--scores", work / "scores", "--model", work / "world/model")
    run("smpo-pipeline", "invert", *common, "--prompt-dropout", 0, "--out", work / NEGATIVE.shards)


def guided_row(work: Path, models: list[Path], guidance: int) -> str:
    """Make the row of a guidance scale."""
    report = f"report-test-{guidance}"
    base = judge(work, report, models, "test", IMAGES, guidance, negative=True).finding(BASE, TRUTH).mean
    return row(work / report, f"{guidance} | {base:.3f}", [model.name for model in models])


def write(work: Path, beta: int, selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    models = [train(work, NEGATIVE, beta, seed, TRAINING) for seed in SEEDS]
    rows = [guided_row(work, models, guidance) for guidance in GUIDANCES]
    command = "python -m benchmarks.experiments.negative"
    text = f"""{stamp(command, ("torch", "diffusers", "transformers", "numpy"))}

Negative models of the embedded world's base (`--objective npo`, beta {beta}): 600 pairs with the annotators' labels,
ReNoise states without prompt dropout; {STEPS} steps of {BATCH} pairs, lr {LR}, all weights trained. `evaluate
--negative` takes the unconditional prediction from them and the conditional one from the base, which the base alone is
compared with at the same scale, from the same noise: {len(SEEDS)} training seeds, {IMAGES} images of each of 64 test
prompts, 16 DDIM steps. Intervals are 95 % bootstraps over prompts (a prompt's images, of all seeds, belong together);
they do not cover the choice of training seeds, so each seed's win rate is listed too.

{head("guidance", "base's true reward", *COLUMNS)}
{chr(10).join(rows)}

{choice_section(selection, [NEGATIVE], BETAS)}

These are gains at guidance {CHOSEN_AT}.
"""
    write_page(target, "A negative model on the embedded world", text)


def main() -> None:
    """Train negative models, evaluate them, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, shards, runs and reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "negative.md", help="page to write")
    arguments = parser.parse_args()
    prepare(arguments.work)
    chosen, selection = choose_betas(arguments.work, [NEGATIVE], BETAS, TRAINING, IMAGES // 2, CHOSEN_AT, negative=True)
    write(arguments.work, chosen[NEGATIVE.label], selection, arguments.out)


if __name__ == "__main__":
    main()
