"""Guide the embedded world's model away from a negative one; writes docs/results/negative.md.

The negative models learn the reversed labels of the world's pairs (`npo`), with all prompts in training and with a
fifth of them dropped, or the base's own estimates without labels (`selfnpo`). For each, settings are chosen on the
validation prompts at guidance 4 with a training seed of its own; then three other seeds are evaluated on the test
prompts at several guidance scales under the true reward: the base with the negative model in place of its own
unconditional prediction, against the base.

    python -m benchmarks.experiments.negative --work DIR

An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.experiments.experiment import BASE, COLUMNS, TRUTH, comparison_row, head, make_world, row, run
from benchmarks.experiments.objectives import BATCH, LR, SEEDS, STEPS, TRAINING, Condition, judge, train
from benchmarks.experiments.settings import Setting, choose, describe, make_settings, tried_section
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results

BETAS = (300, 1000, 3000, 10000)
LEARNING_RATES = ("5e-6", "5e-5", "2e-4")
SHARDS: dict[str, tuple[object, ...]] = {
    "undropped": ("--prompt-dropout", 0),
    "dropped": ("--prompt-dropout", 0.2),
    "truncated": ("--source", "truncated", "--prompt-dropout", 0),
}
WAYS = {
    "npo": make_settings("npo", BETAS, [("--objective", "npo")], "undropped"),
    "npo, 20 % of prompts dropped": make_settings("npo", BETAS, [("--objective", "npo")], "dropped"),
    "selfnpo": [
        (Condition(f"selfnpo-{lr}", "truncated", ("--objective", "selfnpo", "--lr", lr)), 1) for lr in LEARNING_RATES
    ],
}
CHOSEN_AT = 4
GUIDANCES = (2, 4, 7)
IMAGES = 4


def prepare(work: Path) -> None:
    """Make the world, and the states that each way learns from."""
    make_world(work)
    common = ("--pairs", work / "world/pairs", "--scores", work / "scores", "--model", work / "world/model")
    for source, flags in SHARDS.items():
        run("smpo-pipeline", "invert", *common, *flags, "--out", work / f"shards-{source}")


def guided_rows(work: Path, models: dict[str, list[Path]], guidance: int) -> tuple[list[str], str]:
    """Make the rows of a guidance scale, and the one that compares Self-NPO with NPO."""
    name, flat = f"report-test-{guidance}", [model for group in models.values() for model in group]
    base = judge(work, name, flat, "test", IMAGES, guidance, negative=True).finding(BASE, TRUTH).mean
    rows = [
        row(work / name, f"{guidance} | {base:.3f} | {label}", [model.name for model in group])
        for label, group in models.items()
    ]
    return rows, f"| {guidance} {comparison_row(work / name, models, 'selfnpo', 'npo')}"


def write(work: Path, chosen: dict[str, Setting], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    models = {way: [train(work, *setting, seed, TRAINING) for seed in SEEDS] for way, setting in chosen.items()}
    found = [guided_rows(work, models, guidance) for guidance in GUIDANCES]
    command = "python -m benchmarks.experiments.negative"
    text = f"""{stamp(command, ("torch", "diffusers", "transformers", "numpy"))}

Negative models of the embedded world's base, from its 600 pairs. `npo` learns the annotators' labels, reversed, on
ReNoise states; `selfnpo` the base's own estimates (`invert --source truncated`), without labels. {STEPS} steps of
{BATCH} pairs, lr {LR} unless another is named, all weights trained. `evaluate --negative` takes the unconditional
prediction from them and the conditional one from the base, which the base alone is compared with at the same scale,
from the same noise: {len(SEEDS)} training seeds, {IMAGES} images of each of 64 test prompts, 16 DDIM steps. Intervals
are 95 % bootstraps over prompts (a prompt's images, of all seeds, belong together); they do not cover the choice of
training seeds, so each seed's win rate is listed too.

Chosen settings: {"; ".join(f"{way}: `{describe(setting)}`" for way, setting in chosen.items())}.

{head("guidance", "base's true reward", "negative model", *COLUMNS)}
{chr(10).join(line for rows, _ in found for line in rows)}

{head("guidance", "compared, seed by seed", "win rate % (95 %)", "difference of the true reward (95 %)")}
{chr(10).join(compared for _, compared in found)}

{tried_section(selection, WAYS)}

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
    chosen, selection = choose(
        arguments.work, WAYS, TRAINING, IMAGES // 2, report="report-selection", guidance=CHOSEN_AT, negative=True
    )
    write(arguments.work, chosen, selection, arguments.out)


if __name__ == "__main__":
    main()
