"""Train and evaluate with the project's own commands, and make tables of the results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from smpo_pipeline.evaluation.comparison import Comparison, compare
from smpo_pipeline.evaluation.results import Results, read_results

TRUTH = "toy-truth"
BASE = "base"
COLUMNS = ("win rate % (95 %)", "each seed", "mean true reward", "gain over base (95 %)")


def run(program: str, *arguments: object) -> None:
    """Run a command of this project, as a user does."""
    command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_world(work: Path, family: str = "sd15", pairs: int = 600) -> None:
    """Make a world of so many pairs and its scores: ``world/`` and ``scores/``."""
    run("smpo-pipeline", "toy", "--out", work / "world", "--pairs", pairs, "--family", family)
    score(work, work / "world/pairs", work / "scores")


def score(work: Path, pairs: Path, out: Path) -> None:
    """Score pairs by two of the world's reward models."""
    rewards = [f"{name}={work / 'world/rewards' / name}" for name in ("pickscore", "clipscore")]
    run("smpo-pipeline", "score", "--pairs", pairs, "--out", out, "--reward", *rewards)


def evaluate(
    report: Path,
    base: Path,
    runs: Sequence[Path],
    prompts: Path,
    *,
    images: int,
    guidance: float = 1,
    negative: bool = False,
) -> Results:
    """Evaluate trained models, named by their folders, against the base under the true reward.

    Images that the report's folder contains already are not generated again. With ``negative`` the trained models are
    negative ones: the base is guided away from each.
    """
    models = [f"{each.name}={base if negative else each}" for each in runs]
    negatives = ("--negative", *(f"{each.name}={each}" for each in runs)) if negative else ()
    run(
        *("smpo-pipeline", "evaluate", "--model", f"{BASE}={base}", *models, *negatives),
        *("--prompts", prompts, "--images-per-prompt", images, "--sampler", "ddim", "--steps", 16),
        *("--guidance-scale", guidance, "--batch-size", 64, "--reward", TRUTH, "--out", report, "--overwrite"),
    )
    return results_of(report)


def results_of(report: Path) -> Results:
    """Read an evaluation's results."""
    results = read_results(report)
    if results is None:
        raise SystemExit(f"{report} holds no results")
    return results


def comparison(results: Results, model: str) -> Comparison:
    """Comparison of a model with the base under the true reward."""
    found = results.finding(model, TRUTH).versus_baseline
    if found is None:
        raise ValueError(f"{model} is the baseline")
    return found


def gain(results: Results, model: str) -> float:
    """Mean true reward of a model minus that of the base."""
    return comparison(results, model).mean_difference.value


def pooled(report: Path, models: Sequence[str], others: Sequence[str] = (BASE,)) -> tuple[Comparison, float]:
    """Compare several training seeds, pooled by prompt, with others; also returns their mean true reward.

    Args:
        report: an evaluation's folder.
        models: names of trained models.
        others: the models that they are compared with, one by one, or a single one for all.
    """
    table = pq.read_table(report / "scores.parquet", columns=["model", "prompt_index", TRUTH]).to_pandas()
    by_model = {name: rows.sort_values("prompt_index", kind="stable") for name, rows in table.groupby("model")}
    num_prompts = by_model[BASE]["prompt_index"].nunique()
    scores = {name: rows[TRUTH].to_numpy().reshape(num_prompts, -1) for name, rows in by_model.items()}
    tuned = np.concatenate([scores[name] for name in models], axis=1)
    against = list(others) * (len(models) // len(others))
    return compare(tuned, np.concatenate([scores[name] for name in against], axis=1)), float(tuned.mean())


def percent(found: Comparison) -> str:
    """Format win rate and interval as a table cell."""
    rate = found.win_rate
    return f"{100 * rate.value:.1f} ({100 * (rate.low or 0):.1f} .. {100 * (rate.high or 0):.1f})"


def difference(found: Comparison) -> str:
    """Format mean difference and interval as a table cell."""
    mean = found.mean_difference
    return f"{mean.value:+.3f} ({mean.low or 0:+.3f} .. {mean.high or 0:+.3f})"


def row(report: Path, label: str, models: Sequence[str]) -> str:
    """Make a row of a table that ends with :data:`COLUMNS`: all seeds pooled, and each seed's win rate."""
    found, mean = pooled(report, models)
    results = results_of(report)
    each = ", ".join(f"{100 * comparison(results, name).win_rate.value:.0f}" for name in models)
    return f"| {label} | {percent(found)} | {each} | {mean:.3f} | {difference(found)} |"


def head(*columns: str) -> str:
    """Make a table's header."""
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def comparison_row(report: Path, models: Mapping[str, Sequence[Path]], one: str, other: str) -> str:
    """Make the row that compares two conditions, training seed by training seed on the same noise.

    Args:
        report: an evaluation's folder.
        models: trained models by condition.
        one: a condition.
        other: the condition that it is compared with.
    """
    found, _ = pooled(report, *([model.name for model in models[label]] for label in (one, other)))
    return f"| {one} against {other} | {percent(found)} | {difference(found)} |"
