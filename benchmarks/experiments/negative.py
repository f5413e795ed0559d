"""Guide the embedded world's model away from a negative one, trained by `npo`; writes docs/results/negative.md.

The negative models learn the reversed labels of the world's pairs, with all prompts in training and with a fifth of
them dropped. For each, beta is chosen on the validation prompts at guidance 4 with a training seed of its own; then
three other seeds are evaluated on the test prompts at several guidance scales under the true reward: the base with the
negative model in place of its own unconditional prediction, against the base.

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

DROPOUT = {"undropped": 0.0, "dropped": 0.2}
CONDITIONS = [Condition("npo", source, ("--objective", "npo")) for source in DROPOUT]
BETAS = (300, 1000, 3000, 10000)
CHOSEN_AT = 4
GUIDANCES = (2, 4, 7)
IMAGES = 4


def prepare(work: Path) -> None:
    """Make the world and states of its pairs; Diffusion-NPO drops no prompt."""
    make_world(work)
    common = ("--pairs", work / "world/pairs", "--scores", work / "scores", "--model", work / "world/model")
    for condition in CONDITIONS:
        dropout = DROPOUT[condition.source]
        run("smpo-pipeline", "invert", *common, "--prompt-dropout", dropout, "--out", work / condition.shards)


def guided_rows(work: Path, models: dict[str, list[Path]], guidance: int) -> list[str]:
    """Make the rows of a guidance scale."""
    report, flat = f"report-test-{guidance}", [model for group in models.values() for model in group]
    base = judge(work, report, flat, "test", IMAGES, guidance, negative=True).finding(BASE, TRUTH).mean
    return [
        row(work / report, f"{guidance} | {base:.3f} | {label}", [model.name for model in group])
        for label, group in models.items()
    ]


def write(work: Path, chosen: dict[str, int], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    models = {
        f"{DROPOUT[each.source]:g}, beta {chosen[each.label]}": [
            train(work, each, chosen[each.label], seed, TRAINING) for seed in SEEDS
        ]
        for each in CONDITIONS
    }
    rows = [line for guidance in GUIDANCES for line in guided_rows(work, models, guidance)]
    command = "python -m benchmarks.experiments.negative"
    text = f"""{stamp(command, ("torch", "diffusers", "transformers", "numpy"))}

Negative models of the embedded world's base (`--objective npo`): 600 pairs with the annotators' labels, ReNoise states
with the given share of prompts dropped; {STEPS} steps of {BATCH} pairs, lr {LR}, all weights trained. `evaluate
--negative` takes the unconditional prediction from them and the conditional one from the base, which the base alone is
compared with at the same scale, from the same noise: {len(SEEDS)} training seeds, {IMAGES} images of each of 64 test
prompts, 16 DDIM steps. Intervals are 95 % bootstraps over prompts (a prompt's images, of all seeds, belong together);
they do not cover the choice of training seeds, so each seed's win rate is listed too.

{head("guidance", "base's true reward", "prompts dropped", *COLUMNS)}
{chr(10).join(rows)}

{choice_section(selection, CONDITIONS, BETAS)}

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
    chosen, selection = choose_betas(arguments.work, CONDITIONS, BETAS, TRAINING, IMAGES // 2, CHOSEN_AT, negative=True)
    write(arguments.work, chosen, selection, arguments.out)


if __name__ == "__main__":
    main()
