"""Trainings that are judged by what they generate: our command lines as a user runs them, and tables of the outcome."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from smpo_pipeline.evaluation.comparison import Comparison, compare
from smpo_pipeline.evaluation.results import Results, read_results

ROOT = Path(__file__).parents[1]
TRUTH = "toy-truth"
BASE = "base"
COLUMNS = ("win rate % (95 %)", "each seed", "mean true reward", "gain over base (95 %)")


def run(program: str, *arguments: object) -> None:
    """Run a command line of ours, as a user would."""
    command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_world(work: Path) -> None:
    """The demo's world and scores: ``world/`` and ``scores/``."""
    world = work / "world"
    run("smpo-pipeline", "toy", "--out", world, "--pairs", 600)
    rewards = [f"{name}={world / 'rewards' / name}" for name in ("pickscore", "clipscore")]
    run("smpo-pipeline", "score", "--pairs", world / "pairs", "--out", work / "scores", "--reward", *rewards)


def evaluate(
    report: Path, base: Path, runs: Sequence[Path], prompts: Path, *, images: int, guidance: float = 1
) -> Results:
    """Judge trained models, named by their folders, under the true reward, against the base.

    Images of these models that the report's folder holds already are not made again.
    """
    run(
        *("smpo-pipeline", "evaluate", "--model", f"{BASE}={base}", *(f"{each.name}={each}" for each in runs)),
        *("--prompts", prompts, "--images-per-prompt", images, "--steps", 16),
        *("--guidance-scale", guidance, "--batch-size", 64, "--reward", TRUTH, "--out", report, "--overwrite"),
    )
    return results_of(report)


def results_of(report: Path) -> Results:
    """What an evaluation found."""
    results = read_results(report)
    if results is None:
        raise SystemExit(f"{report} holds no results")
    return results


def comparison(results: Results, model: str) -> Comparison:
    """A model against the base under the true reward."""
    found = results.finding(model, TRUTH).versus_baseline
    if found is None:
        raise ValueError(f"{model} is the baseline")
    return found


def gain(results: Results, model: str) -> float:
    """Mean true reward of a model less that of the base."""
    return comparison(results, model).mean_difference.value


def pooled(report: Path, models: Sequence[str], others: Sequence[str] = (BASE,)) -> tuple[Comparison, float]:
    """Several training seeds as one: a prompt's images of all seeds belong together. Also their mean true reward.

    Args:
        report: an evaluation's folder.
        models: names of trained models.
        others: what they are compared with, one by one; a single one stands for all.
    """
    table = pq.read_table(report / "scores.parquet", columns=["model", "prompt_index", TRUTH]).to_pandas()
    by_model = {name: rows.sort_values("prompt_index", kind="stable") for name, rows in table.groupby("model")}
    num_prompts = by_model[BASE]["prompt_index"].nunique()
    scores = {name: rows[TRUTH].to_numpy().reshape(num_prompts, -1) for name, rows in by_model.items()}
    tuned = np.concatenate([scores[name] for name in models], axis=1)
    against = list(others) * (len(models) // len(others))
    return compare(tuned, np.concatenate([scores[name] for name in against], axis=1)), float(tuned.mean())


def percent(found: Comparison) -> str:
    """Win rate and interval, as a cell."""
    rate = found.win_rate
    return f"{100 * rate.value:.1f} ({100 * (rate.low or 0):.1f} .. {100 * (rate.high or 0):.1f})"


def difference(found: Comparison) -> str:
    """Mean difference and interval, as a cell."""
    mean = found.mean_difference
    return f"{mean.value:+.3f} ({mean.low or 0:+.3f} .. {mean.high or 0:+.3f})"


def row(report: Path, label: str, models: Sequence[str]) -> str:
    """One line of a table whose last columns are :data:`COLUMNS`: all seeds pooled, and each seed's own win rate."""
    found, mean = pooled(report, models)
    results = results_of(report)
    each = ", ".join(f"{100 * comparison(results, name).win_rate.value:.0f}" for name in models)
    return f"| {label} | {percent(found)} | {each} | {mean:.3f} | {difference(found)} |"


def head(*columns: str) -> str:
    """A table's first two lines."""
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
