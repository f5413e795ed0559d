"""Train on pairs of which a kind is labelled wrongly; writes docs/results/shift.md.

The embedded world's 600 pairs, shifted on purpose: every label of a caption with a small shape is flipped. A third of
the pairs with a large shape is golden, known to be right and of the kind that the model shall serve; all others come
from one source of which nothing is known. DPO on the labels as they are, on the golden pairs alone, with DoRA's loss
(`--robust`), with its weights (`weigh`), with both, and without the flipped pairs, which are not known in practice. For
each, beta and learning rate are chosen on validation prompts of the golden kind with a training seed of its own, then
three other seeds are evaluated on test prompts of that kind, and of the other one, under the true reward.

    python -m benchmarks.experiments.pairs.shift --work DIR

About an hour on one core. An interrupted stage continues, and a finished one is kept. With --prepare it ends
when the pairs are weighed and inverted.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.experiments.experiment import BASE, COLUMNS, TRUTH, comparison_row, head, make_world, row, run, score
from benchmarks.experiments.objectives import SEEDS, judge, train
from benchmarks.experiments.settings import Setting, Ways, choose, make_settings, tried_section
from benchmarks.page import RESULTS, stamp, write_page
from smpo_pipeline.evaluation.results import Results
from smpo_pipeline.toy.truth import true_reward
from smpo_pipeline.toy.world import scene_of
from smpo_pipeline.weighing.table import write_column
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from smpo_schemas.scoring.weights import WeightsInfo, read_weights

BETAS = (10, 30, 100, 300, 1000, 3000)
STEPS, LR, BATCH = 80, "5e-5", 24
SLOW_LR, SLOW_BETAS = "2e-5", (100, 300, 1000)
TRAINING = (
    *("--max-steps", STEPS, "--batch-size", BATCH, "--warmup-steps", 5),
    *("--lr", LR, "--lr-schedule", "cosine"),
)
GOLDEN_SHARE = 1 / 3
"""Of the pairs with a large shape."""
IMAGES = 4
"""Of each test prompt of the golden kind; half as many of each other prompt."""
KINDS = ("large", "small")
"""Sizes of shapes: the golden kind, and the one whose labels are flipped."""


def shift_pairs(work: Path) -> tuple[Path, dict[str, float]]:
    """Write the shifted pairs; returns their file, and by pair_id 1 for golden pairs and 0 for others."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted((work / "world/pairs").glob("*.parquet"))])
    prompts = table["caption"].to_pylist()
    large = is_golden_kind(prompts)
    label = table["label_0"].to_numpy()
    pair_ids = [str(number) for number in table["ranking_id"].to_pylist()]
    columns = {
        "pair_id": pair_ids,
        "prompt": prompts,
        "image_0": table["jpg_0"],
        "image_1": table["jpg_1"],
        "label": np.where(large, label, 1 - label),
    }
    path = work / "shifted/pairs.parquet"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        pq.write_table(pa.table(columns), path)
    golden = large & (np.random.default_rng(0).random(len(large)) < GOLDEN_SHARE)
    return path, dict(zip(pair_ids, golden.astype(float).tolist(), strict=True))


def prompts_of(work: Path, split: str, kind: str) -> Path:
    """Write the prompts of a split with shapes of one size; returns their file."""
    path = work / f"prompts/{split}-{kind}.txt"
    lines = (work / f"world/prompts/{split}.txt").read_text().splitlines()
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines if scene_of(line).size == kind))
    return path


def prepare(work: Path) -> WeightsInfo:
    """Make the world, shifted pairs, their scores with weights, and states; returns how the weights were made."""
    make_world(work)
    pairs, golden = shift_pairs(work)
    scores = work / "scores-shift"
    score(work, pairs, scores)
    info = read_scores_info(scores)
    ids = read_scores(scores, info, ["pair_id"])["pair_id"].to_pylist()
    write_column(scores, info, "golden", np.array([golden[pair_id] for pair_id in ids]))
    features = f"clipscore={work / 'world/rewards/clipscore'}"
    run(
        "smpo-pipeline",
        "weigh",
        *("--scores", scores, "--pairs", pairs),
        "--golden-column",
        "golden",
        "--features",
        features,
    )
    common = ("--pairs", pairs, "--scores", scores, "--model", work / "world/model")
    run("smpo-pipeline", "invert", *common, "--out", work / "shards-shift")
    # In a table of its own: a further column would change the one that the shards were made with.
    oracle = work / "scores-oracle"
    shutil.copytree(scores, oracle, dirs_exist_ok=True)
    table = read_scores(oracle, info := read_scores_info(oracle), ["pair_id", "prompt"])
    write_column(oracle, info, "right", is_golden_kind(table["prompt"].to_pylist()).astype(float))
    return read_weights(scores)


def is_golden_kind(prompts: list[str]) -> np.ndarray:
    """Whether each prompt is of the golden kind: bool [N]."""
    return np.array([scene_of(prompt).size == KINDS[0] for prompt in prompts])


def describe_labels(work: Path) -> str:
    """Compare the labels with the true reward; return a sentence."""
    pairs = pq.read_table(work / "shifted/pairs.parquet")
    table = read_scores(work / "scores-shift", read_scores_info(work / "scores-shift"), ["pair_id", "weight"])
    weight = dict(zip(table["pair_id"].to_pylist(), table["weight"].to_pylist(), strict=True))
    prompts, label_P = pairs["prompt"].to_pylist(), pairs["label"].to_numpy()
    rewards = [
        true_reward(
            [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in pairs[column].to_pylist()], prompts
        )
        for column in ("image_0", "image_1")
    ]
    weight_P = np.array([weight[pair_id] for pair_id in pairs["pair_id"].to_pylist()])
    right_P, decided_P = (rewards[0] > rewards[1]) == (label_P > 0.5), label_P != 0.5
    plain, weighed = right_P[decided_P].mean(), np.average(right_P[decided_P], weights=weight_P[decided_P])
    share = weight_P[is_golden_kind(prompts)].sum() / weight_P.sum()
    return (
        f"Of the labels {100 * plain:.0f} % agree with the true reward, {100 * weighed:.0f} % of them by weight: the "
        f"pairs with a large\nshape have {100 * share:.0f} % of the weight."
    )


def make_ways(work: Path) -> Ways:
    """List the ways to learn."""
    table = ("--scores", str(work / "scores-shift"), "--weight-column")
    robust, weighed = ("--robust", "1"), (*table, "weight")
    flags: dict[str, tuple[str, ...]] = {
        "dpo": (),
        "golden": (*table, "golden"),
        "robust": robust,
        "weighed": weighed,
        "both": (*robust, *weighed),
        "oracle": ("--scores", str(work / "scores-oracle"), "--weight-column", "right"),
    }
    ways: dict[str, list[Setting]] = {}
    for name, each in flags.items():
        dpo = ("--objective", "dpo", *each)
        slow = make_settings(f"{name}-slow", SLOW_BETAS, [(*dpo, "--lr", SLOW_LR)], "shift")
        ways[name] = make_settings(name, BETAS, [dpo], "shift") + slow
    return ways


def describe_chosen(setting: Setting) -> str:
    """Write the chosen beta and learning rate as flags."""
    condition, beta = setting
    return f"`--beta {beta} --lr {SLOW_LR if SLOW_LR in condition.flags else LR}`"


def kind_section(work: Path, models: dict[str, list[Path]], kind: str, images: int) -> str:
    """Evaluate the models on the test prompts of one kind; returns the section."""
    report, flat = work / f"report-test-{kind}", [model for group in models.values() for model in group]
    results = judge(work, report.name, flat, prompts_of(work, "test", kind), images, 1)
    rows = [row(report, way, [model.name for model in group]) for way, group in models.items()]
    compared = [comparison_row(report, models, way, "dpo") for way in models if way != "dpo"]
    compared += [comparison_row(report, models, *two) for two in (("both", "golden"), ("weighed", "oracle"))]
    title = "the golden kind" if kind == KINDS[0] else "whose labels were flipped"
    return f"""## Test prompts with {kind} shapes, {title}

The base's mean true reward is {results.finding(BASE, TRUTH).mean:.3f}. Each way pools {len(SEEDS)} training seeds,
{results.num_images} images of {results.num_prompts} prompts each:

{head("way", *COLUMNS)}
{chr(10).join(rows)}

{head("compared, seed by seed", "win rate % (95 %)", "difference of the true reward (95 %)")}
{chr(10).join(compared)}"""


def write(work: Path, weights: WeightsInfo, chosen: dict[str, Setting], selection: Results, target: Path) -> None:
    """Train and evaluate the final seeds, and write the page."""
    models = {way: [train(work, *setting, seed, TRAINING) for seed in SEEDS] for way, setting in chosen.items()}
    sections = [kind_section(work, models, kind, IMAGES // (number + 1)) for number, kind in enumerate(KINDS)]
    (source,) = weights.sources.values()
    text = f"""{stamp("python -m benchmarks.experiments.pairs.shift", ("torch", "diffusers", "transformers", "numpy"))}

The embedded world's 600 pairs; labels of captions with a small shape are flipped. {weights.golden} of the pairs with a
large shape are golden; the other {source.pairs} pairs are one source. `dpo` learns from all labels, `golden` from the
golden pairs alone, `robust` with `--robust 1`, `weighed` with the weights of `weigh`, `both` with both, `oracle` from
all pairs with a large shape, the others having weight 0. {STEPS} steps of {BATCH} pairs, lr {LR} unless another is
named, all weights trained. Images are drawn by 16 DDIM steps at guidance 1, by each model from the same noise.
Intervals are 95 % bootstraps over prompts (a prompt's images, of all seeds, belong together); they do not cover the
choice of training seeds, so each seed's win rate is listed too.

The classifier of `weigh` (image and caption, not labels) has a held-out AUC of {source.auc:.3f} and a calibration error
of {source.calibration_error:.3f}; the weights count as {weights.effective_size:.0f} equal ones of {weights.pairs}, the
largest is {weights.max:.2f}. {describe_labels(work)}
It can see this shift, since golden captions have large shapes only. Labels that are wrong at random, or for pictures
that golden pairs have as often, leave no trace in images and captions.

Chosen settings: {"; ".join(f"{way}: {describe_chosen(setting)}" for way, setting in chosen.items())}.

{(chr(10) * 2).join(sections)}

{tried_section(selection, make_ways(Path("WORK")))}
"""
    write_page(target, "Pairs of which a kind is labelled wrongly, on the embedded world", text)


def main() -> None:
    """Run all ways and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for world, pairs, shards, runs, reports")
    parser.add_argument("--out", type=Path, default=RESULTS / "shift.md", help="page to write")
    parser.add_argument("--prepare", action="store_true", help="end before training")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    weights = prepare(work)
    if arguments.prepare:
        return
    validation = prompts_of(work, "validation", KINDS[0])
    chosen, selection = choose(work, make_ways(work), TRAINING, IMAGES, report="report-selection", prompts=validation)
    write(work, weights, chosen, selection, arguments.out)


if __name__ == "__main__":
    main()
