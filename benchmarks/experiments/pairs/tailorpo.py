"""Train on pairs of the sampler's steps (TailorPO) or on generated pairs (SmPO), at equal evaluations of the denoiser.

One reward model labels both. SmPO's pairs are the `extremes` among eight images of every training prompt, inverted; the
step pairs come from as many trajectories of `smpo-pipeline steps` as cost the same evaluations. Both train for as many
steps of as many pairs. For each way settings are chosen on the validation prompts with a training seed of its own, then
three other seeds are evaluated on the test prompts under the true reward, which nothing else sees. Writes
docs/results/tailorpo.md.

    python -m benchmarks.experiments.pairs.tailorpo --work DIR

About 50 minutes of one core. An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.experiments.experiment import BASE, COLUMNS, TRUTH, comparison_row, head, make_world, row, run, score
from benchmarks.experiments.objectives import SEEDS, judge, train
from benchmarks.experiments.pairs.from_prompts import (
    BATCH,
    CANDIDATES,
    PAIRS_A_PROMPT,
    STEPS,
    VALIDATION_IMAGES,
    WORLDS,
)
from benchmarks.experiments.settings import Setting, choose, describe, make_settings, tried_section
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results
from smpo_pipeline.toy.world import captions_of
from smpo_schemas.generation.selection import PAIRS_FILE, SCORES_FOLDER
from smpo_schemas.manifest import Manifest, read_manifest

REWARD = "pickscore"
WORLD = WORLDS["sd15"]
SAMPLER_STEPS = 20
IMAGES = 4
"""Of each test prompt."""
TAILORPO = ("--objective", "dpo", "--timestep-weighting", "transition")
WAYS = {
    "SmPO, generated pairs": make_settings("smpo", (100, 300, 1000), [("--reward", REWARD)], "extremes"),
    "TailorPO, step pairs": make_settings("dpo", (1, 30, 300, 3000, 30000), [TAILORPO], "steps"),
}


def generated_evaluations(manifest: Manifest) -> int:
    """Count the denoiser's evaluations of one latent for a prompt's generated and inverted pairs, by the settings."""
    settings, totals = manifest.inversion, manifest.totals
    inverted = settings.steps * (settings.renoise_steps + 1) + totals.states // totals.samples
    return CANDIDATES * STEPS + PAIRS_A_PROMPT * 2 * inverted


def step_evaluations(steps: int, trained: list[int], candidates: int) -> int:
    """Count those of a trajectory of step pairs without guidance: the sampler's, the draws', and the reference's.

    A step after a trained one needs none: the evaluation at the draw that it continues from is known.
    """
    asked = [step for step in range(steps, min(trained) - 1, -1) if step + 1 not in trained]
    return len(asked) + len(trained) * (candidates + 2)


def prepare(work: Path) -> int:
    """Make the shards of both ways; returns the number of trajectories of a prompt."""
    make_world(work, pairs=16)
    prompts, model, rewards = work / "prompts.txt", work / "world/model", work / "world/rewards"
    prompts.write_text("\n".join(captions_of("train")), encoding="utf-8")
    run(
        *("smpo-pipeline", "generate", "--model", model, "--prompts", prompts, "--images-per-prompt", CANDIDATES),
        *("--sampler", "ddim", "--steps", STEPS, "--guidance-scale", 1, "--batch-size", 64),
        *("--out", work / "candidates"),
    )
    score(work, work / "candidates", work / "candidate-scores")
    selected = work / "selected"
    run(
        *("smpo-pipeline", "select", "--candidates", work / "candidates", "--scores", work / "candidate-scores"),
        *("--by", "extremes", "--reward", REWARD, "--pairs-per-prompt", PAIRS_A_PROMPT, "--out", selected),
    )
    run(
        *("smpo-pipeline", "invert", "--pairs", selected / PAIRS_FILE, "--scores", selected / SCORES_FOLDER),
        *("--model", model, "--out", work / "shards-extremes"),
    )
    affordable = generated_evaluations(read_manifest(work / "shards-extremes"))
    trajectories = affordable // step_evaluations(SAMPLER_STEPS, list(range(SAMPLER_STEPS, 1, -4)), 2)
    run(
        *("smpo-pipeline", "steps", "--model", model, "--prompts", prompts, "--reward", f"{REWARD}={rewards / REWARD}"),
        *("--steps", SAMPLER_STEPS, "--guidance-scale", 1, "--trajectories", trajectories, "--batch-size", 32),
        *("--out", work / "shards-steps"),
    )
    return trajectories


def cost_rows(work: Path, trajectories: int) -> list[str]:
    """Make the rows of what each way's data cost, and hold."""
    pairs, steps = (read_manifest(work / f"shards-{name}") for name in ("extremes", "steps"))
    if steps.steps is None:
        raise ValueError(f"{work / 'shards-steps'} holds no step pairs")
    each = step_evaluations(steps.inversion.steps, steps.steps.trained, steps.steps.candidates)
    counts = {"SmPO": generated_evaluations(pairs), "TailorPO": trajectories * each}
    held = {"SmPO": pairs.totals, "TailorPO": steps.totals}
    return [f"| {way} | {count} | {held[way].pairs} | {held[way].states} |" for way, count in counts.items()]


def write(work: Path, trajectories: int, chosen: dict[str, Setting], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    models = {way: [train(work, *setting, seed, WORLD.training) for seed in SEEDS] for way, setting in chosen.items()}
    report = work / "report-test"
    flat = [model for group in models.values() for model in group]
    results = judge(work, report.name, flat, "test", IMAGES, 1)
    rows = [
        row(report, f"{way}: `{describe(chosen[way])}`", [model.name for model in group])
        for way, group in models.items()
    ]
    first, second = WAYS
    libraries = ("torch", "diffusers", "transformers", "ray", "numpy")
    text = f"""{stamp("python -m benchmarks.experiments.pairs.tailorpo", libraries)}

{REWARD} labels both. SmPO's pairs are the {PAIRS_A_PROMPT} `extremes` among {CANDIDATES} images of each of
{len(captions_of("train"))} training prompts ({STEPS} DDIM steps), inverted with the defaults. TailorPO's are draws of
5 of {SAMPLER_STEPS} stochastic DDIM steps, {trajectories} trajectories of a prompt; both without guidance.
{WORLD.steps} steps of {BATCH} pairs, lr {WORLD.lr}, all weights trained. Images are drawn in the same way, by each
model from the same noise. Intervals are 95 % bootstraps over prompts (a prompt's images, of all seeds, belong
together); they do not cover the choice of training seeds, so each seed's win rate is listed too.

## Test prompts, guidance 1

The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each way pools {len(SEEDS)} training seeds,
{results.num_images} images of {results.num_prompts} prompts each:

{head("way", *COLUMNS)}
{chr(10).join(rows)}

{head("compared, seed by seed", "win rate % (95 %)", "difference of the true reward (95 %)")}
{comparison_row(report, models, second, first)}

## What the data cost

Evaluations of the denoiser, of one latent each, by the settings: for the images or trajectories of a prompt, for the
inversion or the draws, and for the reference's errors. Training costs the same.

{head("way", "evaluations per prompt", "pairs", "states")}
{chr(10).join(cost_rows(work, trajectories))}

{tried_section(selection, WAYS)}
"""
    write_page(target, "Pairs of the sampler's steps on the embedded world", text)


def main() -> None:
    """Run both ways and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, candidates, shards, runs, reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "tailorpo.md", help="page to write")
    arguments = parser.parse_args()
    trajectories = prepare(arguments.work)
    chosen, selection = choose(arguments.work, WAYS, WORLD.training, VALIDATION_IMAGES, report="report-selection")
    write(arguments.work, trajectories, chosen, selection, arguments.out)


if __name__ == "__main__":
    main()
