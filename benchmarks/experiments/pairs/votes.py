"""Train on the shares of few and many voters; writes docs/results/votes.md.

Each pair of the embedded world is shown to 1, 5 or 20 simulated voters, drawn at random with their tastes. Four ways to
learn are compared: SmPO on the votes, on two calibrated rewards, on the rewards as the prior of the votes, and DPO on
the majority. For each, beta is chosen on the validation prompts with a training seed of its own, then three other seeds
are evaluated on the test prompts under the true reward, which nothing else sees.

    python -m benchmarks.experiments.pairs.votes --work DIR

An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
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
from smpo_pipeline.toy.annotators import expected_label
from smpo_schemas.scoring.calibration import read_calibration

VOTERS = (1, 5, 20)
BETAS = (100, 300)
STEPS, LR, BATCH = 100, "5e-5", 24
TRAINING = (
    *("--max-steps", STEPS, "--batch-size", BATCH, "--warmup-steps", 5),
    *("--lr", LR, "--lr-schedule", "cosine"),
)
IMAGES = 4
"""Of each test prompt; half as many of each validation prompt."""


def make_votes(work: Path, voters: int) -> Path:
    """Write the world's pairs with the share of so many voters who prefer image_0; returns the file's folder."""
    out = work / f"votes-{voters}"
    table = pa.concat_tables([pq.read_table(file) for file in sorted((work / "world/pairs").glob("*.parquet"))])
    prompts, sides = table["caption"].to_pylist(), [table[f"jpg_{side}"].to_pylist() for side in (0, 1)]
    images = [[np.asarray(decode_image(data)) for data in side] for side in sides]
    for_first = np.random.default_rng(voters).binomial(voters, expected_label(*images, prompts))
    columns = {
        "pair_id": [str(number) for number in table["ranking_id"].to_pylist()],
        "prompt": prompts,
        "image_0": sides[0],
        "image_1": sides[1],
        "label": for_first / voters,
        "votes": [voters] * len(prompts),
    }
    out.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), out / "pairs.parquet")
    return out


def prepare(work: Path) -> None:
    """Make the world, and for each number of voters pairs, scores, a calibration and shards."""
    make_world(work)
    for voters in VOTERS:
        scores = work / f"scores-{voters}"
        if not (work / f"votes-{voters}").exists():
            make_votes(work, voters)
        pairs = work / f"votes-{voters}/pairs.parquet"
        score(work, pairs, scores)
        run("smpo-pipeline", "calibrate", "--scores", scores)
        common = ("--pairs", pairs, "--scores", scores, "--model", work / "world/model")
        run("smpo-pipeline", "invert", *common, "--out", work / f"shards-{voters}")


def make_conditions(work: Path, voters: int) -> list[Condition]:
    """List the ways to learn from the pairs of so many voters."""
    calibrated = ("--calibration", str(work / f"scores-{voters}/calibration.json"))
    return [
        Condition("votes", str(voters), ("--preference", "votes", *calibrated)),
        Condition("rewards", str(voters), ("--preference", "mixture", *calibrated)),
        Condition("both", str(voters), ("--preference", "votes-mixture", *calibrated)),
        Condition("dpo", str(voters), ("--objective", "dpo")),
    ]


def prior_row(work: Path, voters: int) -> str:
    """Make the row of a number of voters: the fitted strengths of the prior, in votes."""
    prior = read_calibration(work / f"scores-{voters}/calibration.json").votes
    fitted = ("-", "-") if prior is None else (f"{each:.2f}" for each in (prior.strength, prior.mixture_strength))
    return f"| {voters} | {' | '.join(fitted)} |"


def write(work: Path, chosen: dict[str, int], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    conditions = [each for voters in VOTERS for each in make_conditions(work, voters)]
    report = work / "report-test"
    models = {
        each.label: [train(work, each, chosen[each.label], seed, TRAINING) for seed in SEEDS] for each in conditions
    }
    results = judge(work, report.name, [model for group in models.values() for model in group], "test", IMAGES, 1)
    rows = [
        row(report, f"{each.source}, {each.name}, beta {chosen[each.label]}", [it.name for it in models[each.label]])
        for each in conditions
    ]
    compared = [
        comparison_row(report, models, f"{voters}-both", f"{voters}-{name}")
        for voters in VOTERS
        for name in ("votes", "rewards", "dpo")
    ]
    text = f"""{stamp("python -m benchmarks.experiments.pairs.votes", ("torch", "diffusers", "transformers", "numpy"))}

The embedded world's 600 pairs, each shown to 1, 5 or 20 of its annotators. `votes` is SmPO on their share
(`--preference votes`), `rewards` on the calibrated mixture of pickscore and clipscore, `both` on the mixture as the
prior of the votes (`votes-mixture`), `dpo` is DPO on the majority, without ties. Calibrations are fitted to the same
votes. {STEPS} steps of {BATCH} pairs, lr {LR}, all weights trained. Images are drawn by 16 DDIM steps, by each model
from the same noise. Intervals are 95 % bootstraps over prompts (a prompt's images, of all seeds, belong together); they
do not cover the choice of training seeds, so each seed's win rate is listed too.

## Test prompts, guidance 1

The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each condition pools {len(SEEDS)} training
seeds, {results.num_images} images of {results.num_prompts} prompts each:

{head("voters, condition", *COLUMNS)}
{chr(10).join(rows)}

{head("compared, seed by seed", "win rate % (95 %)", "difference of the true reward (95 %)")}
{chr(10).join(compared)}

## Fitted priors

How many votes the prior counts as, by `calibrate`; a single vote a pair cannot say it, and the default is 2:

{head("voters", "`votes`", "`votes-mixture`")}
{chr(10).join(prior_row(work, voters) for voters in VOTERS)}

{choice_section(selection, conditions, BETAS)}
"""
    write_page(target, "Few and many voters on the embedded world", text)


def main() -> None:
    """Run all conditions and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, pairs, shards, runs, reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "votes.md", help="page to write")
    arguments = parser.parse_args()
    prepare(arguments.work)
    conditions = [each for voters in VOTERS for each in make_conditions(arguments.work, voters)]
    chosen, selection = choose_betas(arguments.work, conditions, BETAS, TRAINING, IMAGES // 2)
    write(arguments.work, chosen, selection, arguments.out)


if __name__ == "__main__":
    main()
