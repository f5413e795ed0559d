"""Compare full training and LoRA by the images they generate; writes docs/results/lora.md.

The full runs are those of benchmarks/experiments/trajectory_training.py (`good-renoise-1`). A LoRA needs another
learning rate: it is chosen on the validation prompts with a training seed of its own; then three others are evaluated
on the test prompts.

    python -m benchmarks.experiments.trajectory_training --work DIR good-renoise-1
    python -m benchmarks.experiments.lora --work DIR

About six CPU minutes. An interrupted stage continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.experiments.experiment import BASE, COLUMNS, TRUTH, difference, evaluate, head, pooled, results_of, row
from benchmarks.experiments.trajectory_training import IMAGES, SEEDS, VARIANTS, model_of, runs_of, shards_of, train
from benchmarks.page import RESULTS, stamp, write_page

PAGE = RESULTS / "lora.md"
TITLE = "Full training and LoRA"
FIRST = VARIANTS["good-renoise-1"]
RANK = 8
RATES = ("3e-4", "1e-3")
SELECTION_SEED = 100


def lora(work: Path, rate: str, seed: int) -> Path:
    """Train a LoRA; returns its folder."""
    out = work / "runs" / f"lora-{rate}-s{seed}"
    train(shards_of(work, FIRST), model_of(work, "good"), out, "--lora-rank", RANK, "--lr", rate, "--seed", seed)
    return out


def main() -> None:
    """Choose the learning rate, train, evaluate, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("demo"), help="folder of benchmarks/experiments/trajectory_training.py"
    )
    work: Path = parser.parse_args().work
    base, prompts = model_of(work, "good"), work / "world/prompts"
    selection, report = work / "report-lora-validation", work / "report-lora"
    tried = {rate: lora(work, rate, SELECTION_SEED) for rate in RATES}
    evaluate(selection, base, list(tried.values()), prompts / "validation.txt", images=IMAGES)
    gains = {rate: pooled(selection, [out.name])[0] for rate, out in tried.items()}
    rate = max(RATES, key=lambda each: gains[each].mean_difference.value)
    final = {
        "full, lr 5e-5": runs_of(work, FIRST),
        f"LoRA, rank {RANK}, lr {rate}": [lora(work, rate, s) for s in SEEDS],
    }
    evaluate(report, base, [out for outs in final.values() for out in outs], prompts / "test.txt", images=IMAGES)
    results = results_of(report)
    text = f"""{stamp("python -m benchmarks.experiments.lora", ("torch", "diffusers", "peft", "numpy"), cores=1)}

The embedded world's 600 pairs, the demo's settings (SmPO with two rewards, beta 300, 150 steps of 24 pairs, cosine);
three training seeds, pooled; {results.num_images} images of {results.num_prompts} test prompts per model, scored by
the true reward. The base's mean is {results.finding(BASE, TRUTH).mean:.3f}. Intervals are 95 % bootstraps
over prompts; they do not cover the choice of training seeds, so each seed's win rate is listed too. A test
(`tests/trainer/model/test_policy.py`) checks that stock diffusers pipelines load both results.

{head("trained", *COLUMNS)}
{chr(10).join(row(report, label, [out.name for out in outs]) for label, outs in final.items())}

The LoRA's learning rate was chosen on the validation prompts, with a further training seed. Only these two were tried;
a larger one may be better still:

{head("lr", "gain over base (95 %)")}
{chr(10).join(f"| {each} | {difference(found)} |" for each, found in gains.items())}"""
    write_page(PAGE, TITLE, text)


if __name__ == "__main__":
    main()
