"""Compare noise-tracked states with inverted and forward-noised ones on the embedded world's flow model.

The pairs are those that `from_prompts --family sd3` selects by `extremes`; if it ran in the same folder, its
candidates, inverted states and models are taken. For each source of states beta is chosen on the validation prompts
with a training seed of its own, then three other training seeds are evaluated on the test prompts under the true
reward. The denoiser's evaluations are counted. Writes docs/results/tracked.md.

    python -m benchmarks.experiments.pairs.tracked --work DIR

An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.experiments.experiment import BASE, COLUMNS, TRUTH, head, row
from benchmarks.experiments.objectives import SEEDS, Condition, choice_section, choose_betas, judge, train
from benchmarks.experiments.pairs.from_prompts import (
    BATCH,
    CANDIDATES,
    PAIRS_A_PROMPT,
    REWARDS,
    STEPS,
    VALIDATION_IMAGES,
    WORLDS,
    invert,
    make_candidates,
    select,
)
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results
from smpo_schemas.manifest import Manifest, read_manifest

SOURCES: dict[str, tuple[str, ...]] = {
    "extremes": (),
    "extremes-tracked": ("--source", "tracked"),
    "extremes-forward": ("--source", "forward"),
}
CONDITIONS = [Condition("smpo", source, REWARDS) for source in SOURCES]
WORLD = WORLDS["sd3"]
FORWARDS_OF_A_STEP = 3
"""Of a training step: a forward, and a backward of twice its operations."""


def prepare(work: Path) -> None:
    """Make the shards of each source, from one selection."""
    make_candidates(work, "sd3")
    pairs, scores = select(work, "extremes")
    for condition in CONDITIONS:
        invert(work, pairs, scores, condition, *SOURCES[condition.source])


def evaluations(manifest: Manifest, training_states: int) -> tuple[float, float, float]:
    """Count the denoiser's evaluations per pair: in generation, for its states, in training.

    Args:
        manifest: of shards whose pairs were selected from all candidates.
        training_states: states that training takes, repeated ones counted.

    Returns:
        Evaluations of one latent. Generation counts all candidates of a prompt, those that are in no pair, too.
    """
    settings, totals = manifest.inversion, manifest.totals
    steps = settings.steps * (settings.renoise_steps + 1) if settings.source == "renoise" else 0
    return (
        CANDIDATES * STEPS / PAIRS_A_PROMPT,
        2 * (steps + totals.states / totals.samples),
        2 * FORWARDS_OF_A_STEP * training_states / totals.pairs,
    )


def cost_row(work: Path, condition: Condition) -> str:
    """Make the row of a source's evaluations."""
    manifest = read_manifest(work / condition.shards)
    counts = evaluations(manifest, WORLD.steps * BATCH)
    return f"| {condition.source} | {' | '.join(f'{count:.0f}' for count in (*counts, sum(counts)))} |"


def write(work: Path, chosen: dict[str, int], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    report = work / "report-tracked-test"
    models = {
        each.label: [train(work, each, chosen[each.label], seed, WORLD.training) for seed in SEEDS]
        for each in CONDITIONS
    }
    results = judge(work, report.name, [model for group in models.values() for model in group], "test", WORLD.images, 1)
    rows = [
        row(report, f"{each.source}, beta {chosen[each.label]}", [model.name for model in models[each.label]])
        for each in CONDITIONS
    ]
    libraries = ("torch", "diffusers", "transformers", "ray", "numpy")
    text = f"""{stamp("python -m benchmarks.experiments.pairs.tracked", libraries)}

{read_manifest(work / CONDITIONS[0].shards).totals.pairs} pairs, the `extremes` among {CANDIDATES} candidates of a
prompt, which the flow model of Stable Diffusion 3's layout (`toy --family sd3`) drew by {STEPS} of Euler's steps
(`generate --keep latents --guidance-scale 1`). `extremes` are states by one ReNoise iteration, `extremes-tracked` by
the noise that each image was made from (`invert --source tracked`), `extremes-forward` by Gaussian noise. SmPO on
`pickscore` and `clipscore`, {WORLD.steps} steps of {BATCH} pairs, lr {WORLD.lr}, all weights trained. Images are drawn
in the same way, by each model from the same noise. Intervals are 95 % bootstraps over prompts (a prompt's images, of
all seeds, belong together); they do not cover the choice of training seeds, so each seed's win rate is listed too.

## Test prompts, guidance 1

The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each condition pools {len(SEEDS)} training
seeds, {results.num_images} images of {results.num_prompts} prompts each:

{head("condition", *COLUMNS)}
{chr(10).join(rows)}

## Evaluations of the denoiser per pair

Of one latent each, by the settings. Generation counts all candidates, states the inversion and the reference's error,
training {FORWARDS_OF_A_STEP} evaluations per image of a step (a backward pass is about two forwards):

{head("condition", "generation", "states", "training", "sum")}
{chr(10).join(cost_row(work, each) for each in CONDITIONS)}

{choice_section(selection, CONDITIONS, WORLD.betas)}
"""
    write_page(target, "Noise-tracked pairs on the embedded world's flow model", text)


def main() -> None:
    """Run all conditions and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, candidates, shards, runs, reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "tracked.md", help="page to write")
    arguments = parser.parse_args()
    work = arguments.work
    prepare(work)
    chosen, selection = choose_betas(
        work, CONDITIONS, WORLD.betas, WORLD.training, VALIDATION_IMAGES, report="report-tracked-selection"
    )
    write(work, chosen, selection, arguments.out)


if __name__ == "__main__":
    main()
