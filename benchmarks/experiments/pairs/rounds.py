"""Two rounds on the model's own images, with and without a refreshed reward (APO), against one round.

On the embedded world: the model draws candidates of every training prompt, pickscore scores them, SmPO is trained on
the best against the worst, and once more on the tuned model's own images (`smpo-pipeline rounds`), held to the model of
the round before or to the base. With `refresh` pickscore is fitted again in each round, to labels of people and so that
what they preferred stays above the model's images (APO's reward player). One round has as many steps as two. Beta is
chosen for one round on the validation prompts by the mean of three seeds; then three other seeds are evaluated on the
test prompts under the true reward, which nothing else sees. Writes docs/results/rounds.md.

    python -m benchmarks.experiments.pairs.rounds --work DIR [--beta-only]

An interrupted stage continues, and a finished one is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.experiments.experiment import (
    BASE,
    COLUMNS,
    TRUTH,
    comparison_row,
    evaluate,
    gain,
    head,
    make_world,
    results_of,
    row,
    run,
)
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.calibration.logistic import PENALTIES
from smpo_pipeline.toy.world import captions_of
from smpo_schemas.scoring.refresh import read_refresh

CANDIDATES = 6
HUMAN_PAIRS = 600
STEPS = 60
BATCH = 24
BETAS = (10, 30, 100, 300, 1000)
SELECTION_SEEDS = (1000, 1100, 1200)
SEEDS = (0, 100, 200)
"""Apart, since round k has seed + k."""

PLAIN, REFRESHED, LONG = "without refresh", "with refresh", "one round, twice the steps"
HELD = "without refresh, held to the base"
SAMPLING = {"sampler": "ddim", "steps": 16, "guidance_scale": 1, "batch_size": 64}
COMPARED = (
    (f"{PLAIN}, round 1", f"{PLAIN}, round 0"),
    (f"{REFRESHED}, round 1", f"{REFRESHED}, round 0"),
    (f"{HELD}, round 1", f"{PLAIN}, round 0"),
    (f"{PLAIN}, round 1", LONG),
    (f"{HELD}, round 1", LONG),
    (f"{REFRESHED}, round 1", LONG),
    (f"{REFRESHED}, round 1", f"{PLAIN}, round 1"),
)


def training(beta: int, steps: int = STEPS) -> dict[str, Any]:
    """Flags of smpo-train, as keys of a config file."""
    return {
        "beta": beta,
        "lr": 5e-5,
        "lr_schedule": "cosine",
        "warmup_steps": 5,
        "batch_size": BATCH,
        "max_steps": steps,
    }


def go_round(
    work: Path, name: str, seed: int, beta: int, rounds: int, *, refresh: bool = False, reference: str = "previous"
) -> Path:
    """Run rounds; returns their folder."""
    world, out = work / "world", work / "rounds" / f"{name}-b{beta}-s{seed}"
    pickscore = f"pickscore={world / 'rewards/pickscore'}"
    reward = "refreshed" if refresh else "pickscore"
    config: dict[str, Any] = {
        "base": str(world / "model"),
        "prompts": str(world / "prompts/train.txt"),
        "rounds": rounds,
        "seed": seed,
        "reference": reference,
        "generate": {**SAMPLING, "images_per_prompt": CANDIDATES},
        "score": {} if refresh else {"reward": pickscore},
        "select": {"by": "extremes", "pairs_per_prompt": 2},
        "train": {**training(beta), "reward": reward},
    }
    if refresh:
        config["refresh"] = {"reward": pickscore, "scores": str(work / "scores"), "pairs": str(world / "pairs")}
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    run("smpo-pipeline", "rounds", "--config", file, "--out", out)
    return out


def train_longer(work: Path, rounds: Path, beta: int, seed: int, steps: int) -> Path:
    """Train on the shards of the first of some rounds with other flags; returns the model's folder."""
    out = work / "runs" / f"steps{steps}-b{beta}-s{seed}"
    flags = [word for key, value in training(beta, steps).items() for word in (f"--{key.replace('_', '-')}", value)]
    common = ("--shards", rounds / "round-000/shards", "--model", work / "world/model", "--seed", seed)
    run("smpo-train", *common, "--reward", "pickscore", *flags, "--out", out)
    return out


def named(work: Path, name: str, model: Path) -> Path:
    """Give a model's folder the name that tables have; returns a link to it."""
    link = work / "models" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(model.absolute())
    return link


def choose_beta(work: Path) -> tuple[int, list[str]]:
    """Choose beta for one round on the validation prompts, by the mean of seeds; returns it, and a table's rows."""
    make_world(work, pairs=HUMAN_PAIRS)
    first, *others = BETAS
    links: dict[int, list[Path]] = {beta: [] for beta in BETAS}
    for seed in SELECTION_SEEDS:
        out = go_round(work, "plain", seed, first, 1)
        models = {first: out / "round-000/run"}
        models |= {beta: train_longer(work, out, beta, seed, STEPS) for beta in others}
        for beta, model in models.items():
            links[beta].append(named(work, f"selection-b{beta}-s{seed}", model))
    report, prompts = work / "report-selection", work / "world/prompts/validation.txt"
    every = [link for group in links.values() for link in group]
    results = evaluate(report, work / "world/model", every, prompts, images=2)
    gains = {beta: [gain(results, link.name) for link in group] for beta, group in links.items()}
    means = {beta: float(np.mean(values)) for beta, values in gains.items()}
    rows = [
        f"| {beta} | {means[beta]:+.3f} | {', '.join(f'{value:+.3f}' for value in gains[beta])} |" for beta in BETAS
    ]
    return max(BETAS, key=lambda beta: means[beta]), rows


def seeds_of(work: Path, beta: int) -> Iterator[tuple[str, Path]]:
    """Train all seeds of all conditions: yields condition and model."""
    for seed in SEEDS:
        plain = go_round(work, "plain", seed, beta, 2)
        refreshed = go_round(work, "apo", seed, beta, 2, refresh=True)
        held = go_round(work, "held", seed, beta, 2, reference="base")
        for condition, short, out in ((PLAIN, "plain", plain), (REFRESHED, "apo", refreshed)):
            for number in (0, 1):
                model = out / f"round-00{number}/run"
                yield f"{condition}, round {number}", named(work, f"{short}-{number}-s{seed}", model)
        yield f"{HELD}, round 1", named(work, f"held-1-s{seed}", held / "round-001/run")
        yield LONG, named(work, f"long-s{seed}", train_longer(work, plain, beta, seed, 2 * STEPS))


def refresh_rows(work: Path, beta: int) -> list[str]:
    """Make a row for each refreshed reward: its chosen penalty, and measures before and after."""
    rows = []
    for seed in SEEDS:
        for number in (0, 1):
            info = read_refresh(work / "rounds" / f"apo-b{beta}-s{seed}" / f"round-00{number}/refreshed")
            before, after = info.before, info.after
            cells = [
                f"{info.l2:g}",
                f"{100 * before.agreement:.1f}, {100 * after.agreement:.1f}",
                f"{before.log_loss:.4f}, {after.log_loss:.4f}",
                f"{100 * before.golden_over_sample:.1f}, {100 * after.golden_over_sample:.1f}",
                f"{info.change:.4f}",
            ]
            rows.append(f"| {seed}, round {number} | {' | '.join(cells)} |")
    return rows


def write(work: Path, beta: int, selection: list[str], target: Path) -> None:
    """Evaluate all models on the test prompts and write the page."""
    models: dict[str, list[Path]] = {}
    for condition, model in seeds_of(work, beta):
        models.setdefault(condition, []).append(model)
    report, prompts = work / "report-test", work / "world/prompts/test.txt"
    every = [model for group in models.values() for model in group]
    evaluate(report, work / "world/model", every, prompts, images=4)
    results = results_of(report)
    rows = [row(report, condition, [model.name for model in group]) for condition, group in models.items()]
    libraries = ("torch", "diffusers", "transformers", "ray", "numpy")
    text = f"""{stamp("python -m benchmarks.experiments.pairs.rounds", libraries)}

The embedded world's model draws {CANDIDATES} candidates of {len(captions_of("train"))} training prompts (DDIM, 16
steps, guidance 1) in each round; two pairs of a prompt are selected by `extremes` and inverted by the reference: the
model of the round before or, `held to the base`, always the base (its round 0 is that without refresh). {STEPS} steps
of {BATCH} pairs a round, lr 5e-5, beta {beta}, all weights trained.
`without refresh` learns from pickscore. `with refresh` learns from pickscore refreshed in each round on {HUMAN_PAIRS}
labelled pairs and the round's candidates (`--adversarial 0.1`, 4 samples). Intervals are 95 % bootstraps over prompts
(a prompt's images, of all seeds, belong together); they do not cover the choice of training seeds, so each seed's win
rate is listed too.

## Test prompts, guidance 1

The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each condition pools {len(SEEDS)} training
seeds, {results.num_images} images of {results.num_prompts} prompts each:

{head("condition", *COLUMNS)}
{chr(10).join(rows)}

{head("compared, seed by seed", "win rate % (95 %)", "difference of the true reward (95 %)")}
{chr(10).join(comparison_row(report, models, *each) for each in COMPARED)}

## What refreshing changed

For each seed and round: the L2 penalty that held-out loss chose (of {min(PENALTIES):g} to {max(PENALTIES):g}); before
and after the refresh, how often the reward agrees with held-out labels, its log-loss on them, and how often it prefers
people's choices to the round's images; and the mean change of P(image_0 preferred):

{head("seed", "L2", "agreement %", "log-loss", "choices over images %", "change")}
{chr(10).join(refresh_rows(work, beta))}

## How beta was chosen

One round without refresh, {len(SELECTION_SEEDS)} seeds of its own (images and training), the validation prompts. The
largest mean gain of the true reward decides; beta is then that of all conditions:

{head("beta", "mean gain", "each seed")}
{chr(10).join(selection)}
"""
    write_page(target, "Rounds on the model's own images, on the embedded world", text)


def main() -> None:
    """Run all conditions and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, rounds, runs, reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "rounds.md", help="page to write")
    parser.add_argument("--beta-only", action="store_true", help="choose beta, and end")
    arguments = parser.parse_args()
    beta, selection = choose_beta(arguments.work)
    print(f"beta {beta} of", *selection)
    if not arguments.beta_only:
        write(arguments.work, beta, selection, arguments.out)


if __name__ == "__main__":
    main()
