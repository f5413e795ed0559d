"""An evaluation in a model card: win rates, and a few images."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import reading_parquet
from smpo_models.sampling import sampling_in_words
from smpo_models.sharing.card import table
from smpo_pipeline.evaluation.results import RESULTS_FILE, SCORES_FILE, Results, read_results
from smpo_pipeline.evaluation.summary import percent_interval, signed_interval

_SAMPLES = 4


def read_evaluation(folder: Path) -> Results:
    """Read a finished evaluation.

    Raises:
        UserError: the folder holds no finished evaluation.
    """
    results = read_results(folder)
    if results is None:
        raise UserError(
            f"--evaluation {folder} has no {RESULTS_FILE}: not an output of `evaluate`, or an unfinished one"
        )
    return results


def name_in(results: Results, model: Path, evaluation: Path) -> str:
    """Return the name that an evaluation gave to a model's folder.

    Raises:
        UserError: the evaluation has no model from this folder.
    """
    for entry in results.models:
        if Path(entry.source).resolve() == model.resolve():
            return entry.name
    compared = ", ".join(f"{entry.name}={entry.source}" for entry in results.models)
    raise UserError(f"--evaluation {evaluation} has no model from {model}; it compared {compared}")


def evaluation_table(results: Results, name: str) -> str:
    """Write one model's win rates against the baseline as Markdown."""
    settings = results.settings
    sampling = sampling_in_words(settings.sampler, settings.steps, settings.guidance_scale)
    trained = next(entry.trained_rewards for entry in results.models if entry.name == name)
    rows: list[tuple[object, ...]] = []
    for finding in results.findings:
        versus = finding.versus_baseline
        if finding.model == name and versus:
            reward = f"{finding.reward} (trained on)" if finding.reward in trained else finding.reward
            rate = f"{100 * versus.win_rate.value:.1f} %"
            rows.append((reward, rate, percent_interval(versus.win_rate), signed_interval(versus.mean_difference)))
    if not rows:
        return ""
    columns = ("reward", "win rate", "95 % interval", "mean gain, in the reward's unit")
    return (
        f"Against {results.baseline}, on {results.num_images} images of {results.num_prompts} prompts; {sampling}. "
        f"Ties count half; intervals are over prompts.\n\n{table(columns, rows)}"
    )


def sample_images(results: Results, folder: Path, name: str) -> tuple[str, dict[str, Path]]:
    """Show the first image of the first prompts, the baseline's beside the model's.

    Returns:
        Markdown, and the image files by their path in the repository; empty if the images are gone.

    Raises:
        UserError: the evaluation's table is damaged.
    """
    with reading_parquet(folder / SCORES_FILE):
        rows = pq.read_table(folder / SCORES_FILE, columns=["model", "prompt", "image_index", "file"]).to_pylist()
    shown = list(dict.fromkeys((results.baseline, name)))
    files = {(row["model"], row["prompt"]): folder / row["file"] for row in rows if row["image_index"] == 0}
    cells: list[tuple[object, ...]] = []
    images: dict[str, Path] = {}
    for number, prompt in enumerate(results.settings.prompts[:_SAMPLES]):
        paths = {model: files.get((model, prompt)) for model in shown}
        if all(path and path.is_file() for path in paths.values()):
            named = {f"samples/{number}-{model}.png": path for model, path in paths.items() if path}
            images |= named
            cells.append((prompt, *(f"![{number}]({file})" for file in named)))
    return (table(("prompt", *shown), cells) if cells else ""), images
