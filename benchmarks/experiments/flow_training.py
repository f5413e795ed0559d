"""Compare objectives and sources of states on the embedded world's flow model; writes docs/results/flow_training.md.

Six conditions (dpo and smpo; each on ReNoise states of one iteration, on exactly inverted ones, and on forward-noised
ones), all from one set of pairs, which the flow model drew itself. For each, beta is chosen on the validation prompts
with a training seed of its own, then three other training seeds are evaluated on the test prompts under the true
reward, which nothing else sees.

    python -m benchmarks.experiments.flow_training --work DIR

About two hours on two cores. An interrupted stage continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.experiments.experiment import BASE, COLUMNS, TRUTH, head, make_world, row, run
from benchmarks.experiments.objectives import SEEDS, Condition, choice_section, choose_betas, judge, train
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results

INVERSIONS: dict[str, tuple[str, ...]] = {
    "renoise": (),
    "exact": ("--solver", "anderson"),
    "forward": ("--source", "forward"),
}
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "dpo": ("--objective", "dpo"),
    "smpo": ("--reward", "pickscore", "clipscore"),
}
CONDITIONS = [Condition(name, source, flags) for source in INVERSIONS for name, flags in OBJECTIVES.items()]
BETAS = (30, 100)
STEPS, LR, BATCH, WARMUP, SCHEDULE = 60, "5e-4", 24, 5, "cosine"
TRAINING = (
    *("--max-steps", STEPS, "--lr", LR, "--batch-size", BATCH),
    *("--warmup-steps", WARMUP, "--lr-schedule", SCHEDULE),
)
IMAGES = 2
"""Of each prompt; the model reads 272 text tokens for each of its 16 image tokens, which takes most of the time."""

GUIDANCES = (1, 2)


def prepare(work: Path) -> None:
    """Make the flow model's world, scores, and shards of each source."""
    make_world(work, "sd3")
    common = ("--pairs", work / "world/pairs", "--scores", work / "scores", "--model", work / "world/model")
    for source, flags in INVERSIONS.items():
        run("smpo-pipeline", "invert", *common, *flags, "--out", work / Condition("", source, ()).shards)


def section(work: Path, chosen: dict[str, int], models: dict[str, list[Path]], guidance: int) -> str:
    """Make the section of the test prompts at one guidance scale."""
    report = f"report-test-{guidance}"
    results = judge(work, report, [model for group in models.values() for model in group], "test", IMAGES, guidance)
    rows = [
        row(
            work / report,
            f"{each.source}, {each.name}, beta {chosen[each.label]}",
            [model.name for model in models[each.label]],
        )
        for each in CONDITIONS
    ]
    return f"""## Test prompts, guidance {guidance}

The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each condition pools {len(SEEDS)} training
seeds, {results.num_images} images of {results.num_prompts} prompts each:

{head("condition", *COLUMNS)}
{chr(10).join(rows)}"""


def write(work: Path, chosen: dict[str, int], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    models = {
        each.label: [train(work, each, chosen[each.label], seed, TRAINING) for seed in SEEDS] for each in CONDITIONS
    }
    sections = [section(work, chosen, models, guidance) for guidance in GUIDANCES]
    libraries = ("torch", "diffusers", "transformers", "numpy")
    text = f"""{stamp("python -m benchmarks.experiments.flow_training", libraries)}

A flow model of Stable Diffusion 3's layout (`toy --family sd3`), 600 pairs of its own samples; {STEPS} steps of {BATCH}
pairs, AdamW, lr {LR} ({SCHEDULE}, {WARMUP} warm-up steps), gamma 10, all weights trained. `dpo` learns from the
annotators' labels, `smpo` from pickscore and clipscore with weight 1 each. `renoise` are states of one ReNoise
iteration, `exact` those of `--solver anderson`, `forward` those of `--source forward`. Images are drawn by 16 of
Euler's steps, from the same noise by each model. Intervals are 95 % bootstraps over prompts (a prompt's images, of all
seeds, belong together); they do not cover the choice of training seeds, so each seed's win rate is listed too.

{(chr(10) * 2).join(sections)}

{choice_section(selection, CONDITIONS, BETAS)}
"""
    write_page(target, "Objectives and state sources on the embedded world's flow model", text)


def main() -> None:
    """Run all conditions and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, shards, runs and reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "flow_training.md", help="page to write")
    arguments = parser.parse_args()
    prepare(arguments.work)
    chosen, selection = choose_betas(arguments.work, CONDITIONS, BETAS, TRAINING, IMAGES)
    write(arguments.work, chosen, selection, arguments.out)


if __name__ == "__main__":
    main()
