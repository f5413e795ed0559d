"""What the page's script needs for the table of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smpo_pipeline.evaluation.report.pictures import Pictures
from smpo_pipeline.evaluation.report.tables import Scores
from smpo_pipeline.evaluation.results import Results

SHOWN_IMAGE = 0
"""The image of each prompt that the table shows; it is not chosen by score."""


def prompt_table(
    results: Results, scores: Scores, files: Mapping[str, Sequence[Path]], pictures: Pictures, shown: Mapping[Path, str]
) -> dict[str, Any]:
    """Return prompts, categories, scores and pictures as JSON values.

    Args:
        results: the evaluation's results.
        scores: of all images.
        files: per model, its images' files, prompt by prompt.
        pictures: the embedded ones.
        shown: how the page names each file.
    """
    settings = results.settings
    models = [model.name for model in results.models]
    per_prompt = settings.images_per_prompt

    def one(number: int) -> dict[str, Any]:
        paths = [files[model][number * per_prompt + SHOWN_IMAGE] for model in models]
        return {
            "number": number,
            "prompt": settings.prompts[number],
            "category": settings.categories[number] if settings.categories else "",
            "files": [shown[path] for path in paths],
            "pictures": [pictures.by_path[path].uri for path in paths],
            "sizes": ["{} x {}".format(*pictures.by_path[path].size) for path in paths],
            "means": _per_model(scores, models, lambda values: values[number].mean()),
            "own": _per_model(scores, models, lambda values: values[number, SHOWN_IMAGE]),
        }

    return {
        "models": models,
        "rewards": [reward.name for reward in results.rewards],
        "rows": [one(number) for number in range(results.num_prompts)],
    }


def _per_model(scores: Scores, models: Sequence[str], reduce: Callable[[np.ndarray], float]) -> list[list[float]]:
    """Reduce each model's scores [P, I] under each reward to a number: a list per model, a number per reward."""
    return [[float(f"{reduce(by_model[model]):.6g}") for by_model in scores.values()] for model in models]
