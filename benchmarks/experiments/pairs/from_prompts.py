"""Start from prompts alone: compare how pairs are selected among a model's own images.

The base model draws eight candidates of every training prompt, two reward models score them, `select` makes pairs by
`extremes` and by `pareto`, and SmPO is trained on their inverted states (on those of `pareto`, CaPO, too). Pairs of the
embedded world, drawn at random, are inverted and trained alike. For each condition beta is chosen on the
validation prompts with a training seed of its own, then three other training seeds are evaluated on the test prompts
under the true reward, which nothing else sees. Writes docs/results/from_prompts.md, or with `--family sd3`, the world's
flow model, docs/results/from_prompts_flow.md.

    python -m benchmarks.experiments.pairs.from_prompts --work DIR [--family sd3]

An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.experiments.experiment import (
    BASE,
    COLUMNS,
    TRUTH,
    comparison_row,
    head,
    make_world,
    row,
    run,
    score,
)
from benchmarks.experiments.objectives import SEEDS, Condition, choice_section, choose_betas, judge, train
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results
from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.toy.truth import true_reward
from smpo_pipeline.toy.world import captions_of
from smpo_schemas.generation.selection import PAIRS_FILE, SCORES_FOLDER

CANDIDATES = 8
PAIRS_A_PROMPT = 2
STEPS = 16
BATCH = 24
VALIDATION_IMAGES = 2
"""Of each validation prompt."""

METHODS = ("extremes", "pareto")
REWARDS = ("--reward", "pickscore", "clipscore")
COMPARED = (("extremes-smpo", "world-smpo"), ("pareto-smpo", "world-smpo"), ("pareto-smpo", "extremes-smpo"))


@dataclass(frozen=True)
class World:
    """A base model, and how it is trained and evaluated.

    Attributes:
        layout: of the model.
        page: that is written, in docs/results.
        every: how many training prompts there are for one that is used.
        steps: of training, each of ``BATCH`` pairs.
        lr: highest learning rate.
        betas: to choose among.
        images: of each test prompt.
    """

    layout: str
    page: str
    every: int
    steps: int
    lr: str
    betas: tuple[int, ...]
    images: int

    @property
    def training(self) -> tuple[object, ...]:
        """Flags of smpo-train."""
        steps = ("--max-steps", self.steps, "--batch-size", BATCH, "--warmup-steps", 5)
        return (*steps, "--lr", self.lr, "--lr-schedule", "cosine")


WORLDS = {
    "sd15": World("Stable Diffusion 1.5's layout", "from_prompts", 1, 100, "5e-5", (100, 300), 4),
    "sd3": World("Stable Diffusion 3's layout (a flow model)", "from_prompts_flow", 2, 60, "5e-4", (30, 100), 2),
}


def make_candidates(work: Path, family: str) -> None:
    """Make the world, and candidates of its training prompts with their scores and latents."""
    prompts = captions_of("train")[:: WORLDS[family].every]
    make_world(work, family, PAIRS_A_PROMPT * len(prompts))
    (work / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    run(
        *("smpo-pipeline", "generate", "--model", work / "world/model", "--prompts", work / "prompts.txt"),
        *("--images-per-prompt", CANDIDATES, "--sampler", "ddim", "--steps", STEPS),
        *("--guidance-scale", 1, "--batch-size", 64, "--keep", "latents", "--out", work / "candidates"),
    )
    score(work, work / "candidates", work / "candidate-scores")


def select(work: Path, method: str) -> tuple[Path, Path]:
    """Select pairs among the candidates; returns them and their scores."""
    out = work / f"selected-{method}"
    run(
        *("smpo-pipeline", "select", "--candidates", work / "candidates", "--scores", work / "candidate-scores"),
        *("--by", method, *REWARDS, "--pairs-per-prompt", PAIRS_A_PROMPT, "--out", out),
    )
    return out / PAIRS_FILE, out / SCORES_FOLDER


def invert(work: Path, pairs: Path, scores: Path, condition: Condition, *flags: object) -> None:
    """Invert pairs into the shards of a condition."""
    common = ("--pairs", pairs, "--scores", scores, "--model", work / "world/model")
    run("smpo-pipeline", "invert", *common, *flags, "--out", work / condition.shards)


def make_conditions(work: Path, family: str) -> list[Condition]:
    """List what is compared: pairs of some source under an objective; CaPO on the faster model alone."""
    smpo = [Condition("smpo", source, REWARDS) for source in ("world", *METHODS)]
    winrate = ("--preference", "winrate", "--scores", str(work / "selected-pareto" / SCORES_FOLDER))
    capo = Condition("capo", "pareto", ("--objective", "capo", *REWARDS, *winrate))
    return [*smpo, capo] if family == "sd15" else smpo


def prepare(work: Path, family: str) -> None:
    """Make the shards of all conditions."""
    make_candidates(work, family)
    invert(work, work / "world/pairs", work / "scores", Condition("", "world", ()))
    for method in METHODS:
        pairs, scores = select(work, method)
        invert(work, pairs, scores, Condition("", method, ()))


def selection_row(work: Path, method: str) -> str:
    """Make the row of a selection: how the true reward, which it does not see, ranks its pairs."""
    pairs = pq.read_table(work / f"selected-{method}" / PAIRS_FILE).to_pylist()
    prompts = [pair["prompt"] for pair in pairs]
    images = [[np.asarray(decode_image(pair[f"image_{side}"])) for pair in pairs] for side in (0, 1)]
    truths = [true_reward(each, prompts) for each in images]
    chosen_is_0 = np.array([pair["chosen_image"] == 0 for pair in pairs])
    gaps = np.where(chosen_is_0, 1, -1) * (truths[0] - truths[1])
    agrees = 100 * ((gaps > 0) + (gaps == 0) / 2).mean()
    return f"| {method} | {len(pairs)} | {len(set(prompts))} | {gaps.mean():+.3f} | {agrees:.0f} |"


def write(work: Path, family: str, chosen: dict[str, int], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    world, conditions, report = WORLDS[family], make_conditions(work, family), work / "report-test"
    models = {
        each.label: [train(work, each, chosen[each.label], seed, world.training) for seed in SEEDS]
        for each in conditions
    }
    results = judge(work, report.name, [model for group in models.values() for model in group], "test", world.images, 1)
    rows = [
        row(report, f"{each.source}, {each.name}, beta {chosen[each.label]}", [it.name for it in models[each.label]])
        for each in conditions
    ]
    prompts = len(captions_of("train")[:: world.every])
    command = "python -m benchmarks.experiments.pairs.from_prompts" + (
        f" --family {family}" if family != "sd15" else ""
    )
    capo = ", `capo` from their win rates over a prompt's candidates" if family == "sd15" else ""
    text = f"""{stamp(command, ("torch", "diffusers", "transformers", "ray", "numpy"))}

The embedded world's model of {world.layout} draws {CANDIDATES} candidates of {prompts} training prompts
(`generate --sampler ddim`, {STEPS} steps, guidance 1). `pickscore` and `clipscore` score them, with equal weights;
{PAIRS_A_PROMPT} pairs of a prompt are selected, and inverted with the defaults. `world` are {PAIRS_A_PROMPT * prompts}
pairs of the same model's images of random training prompts, not selected (in JPEG files, candidates in PNG). `smpo`
learns from the two rewards{capo}; {world.steps} steps of {BATCH} pairs, lr
{world.lr}, all weights trained. Images are drawn in the same way, by each model from the same noise. Intervals are 95 %
bootstraps over prompts (a prompt's images, of all seeds, belong together); they do not cover the choice of training
seeds, so each seed's win rate is listed too.

## Selected pairs

By the true reward, which `select` does not see; a tie is half an agreement:

{head("`--by`", "pairs", "prompts", "true reward, chosen - rejected", "chosen is better %")}
{chr(10).join(selection_row(work, method) for method in METHODS)}

## Test prompts, guidance 1

The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each condition pools {len(SEEDS)} training
seeds, {results.num_images} images of {results.num_prompts} prompts each:

{head("condition", *COLUMNS)}
{chr(10).join(rows)}

{head("compared, seed by seed", "win rate % (95 %)", "difference of the true reward (95 %)")}
{chr(10).join(comparison_row(report, models, *each) for each in COMPARED)}

{choice_section(selection, conditions, world.betas)}
"""
    title = "From prompts alone, on the embedded world" + ("'s flow model" if family == "sd3" else "")
    write_page(target, title, text)


def main() -> None:
    """Run all conditions and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, candidates, shards, runs, reports")
    parser.add_argument("--family", choices=WORLDS, default="sd15", help="layout of the world's model")
    parser.add_argument("--out", type=Path, help="page to write; default: in docs/results")
    arguments = parser.parse_args()
    work, world = arguments.work, WORLDS[arguments.family]
    prepare(work, arguments.family)
    conditions = make_conditions(work, arguments.family)
    chosen, selection = choose_betas(work, conditions, world.betas, world.training, VALIDATION_IMAGES)
    write(work, arguments.family, chosen, selection, arguments.out or RESULTS / f"{world.page}.md")


if __name__ == "__main__":
    main()
