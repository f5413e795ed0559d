"""``report.html``: a self-contained page (inline style, images as data URIs, no scripts)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from smpo_common.files import write_bytes
from smpo_models.sampling import sampling_in_words
from smpo_pipeline.evaluation.charts import curve, distribution
from smpo_pipeline.evaluation.evaluation import Evaluation
from smpo_pipeline.evaluation.gallery import Shown, Spot, embed, select_extremes, select_random
from smpo_pipeline.evaluation.results import REPORT_FILE, Results
from smpo_pipeline.evaluation.summary import headlines, percent_interval, signed_interval
from smpo_pipeline.evaluation.training import read_curves

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Example:
    """One image of the baseline and one of a model, from the same prompt and noise."""

    prompt: str
    shown: list[Shown]


@dataclass(frozen=True)
class Gallery:
    """A titled list of examples; ``note`` says how they were selected."""

    title: str
    note: str
    examples: list[Example]


@dataclass(frozen=True)
class Section:
    """One model's galleries; those of all rewards but the first are folded."""

    model: str
    galleries: list[Gallery]
    folded: list[Gallery] = field(default_factory=list)


def write_report(evaluation: Evaluation, results: Results, scores: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Render the page into the evaluation's folder.

    Args:
        evaluation: the evaluation.
        results: its results.
        scores: per reward and model, float [P, I].
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smpo_pipeline.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(percent_interval=percent_interval, signed_interval=signed_interval)
    settings = results.settings
    page = environment.get_template(_TEMPLATE).render(
        results=results,
        sampling=sampling_in_words(settings.sampler, settings.steps, settings.guidance_scale),
        headlines=headlines(results),
        colours={model.name: f"series-{number}" for number, model in enumerate(results.models)},
        distributions=_distributions(results, scores),
        sections=[_section(evaluation, results, scores, model.name) for model in results.models[1:]],
        training=_training(evaluation),
    )
    write_bytes(evaluation.out / REPORT_FILE, page.encode())


def _distributions(results: Results, scores: Mapping[str, Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    return [
        {
            "reward": reward.name,
            "unit": reward.unit,
            "chart": distribution(scores[reward.name], f"distribution of {reward.name} by model"),
        }
        for reward in results.rewards
    ]


def _training(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Draw the training curves, by name, of each model that has a ``metrics.jsonl``."""
    training = []
    for model in evaluation.models:
        if model.metrics:
            curves = read_curves(model.metrics).items()
            charts = [(name, curve(*points, f"{name} of {model.name} over optimizer steps")) for name, points in curves]
            training.append((model.name, charts))
    return training


def _section(
    evaluation: Evaluation, results: Results, scores: Mapping[str, Mapping[str, np.ndarray]], model: str
) -> Section:
    pair = (results.baseline, model)
    cache: dict[Path, tuple[str, bool]] = {}

    def gallery(title: str, note: str, spots: Sequence[Spot]) -> Gallery:
        return Gallery(title, note, [_example(evaluation, scores, pair, spot, cache) for spot in spots])

    by_reward: list[list[Gallery]] = []
    for reward, by_model in scores.items():
        extremes = select_extremes(by_model[model] - by_model[results.baseline])
        note = f"by difference in {reward}, at most one image per prompt"
        by_reward.append(
            [
                gallery(f"Largest gains under {reward}", note, extremes.best),
                gallery(f"Largest losses under {reward}", note, extremes.worst),
            ]
        )
    spots = select_random(results.num_prompts, results.settings.images_per_prompt)
    random = gallery("Drawn at random", "regardless of scores", spots)
    return Section(model, [*by_reward[0], random], [folded for galleries in by_reward[1:] for folded in galleries])


def _example(
    evaluation: Evaluation,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    models: Sequence[str],
    spot: Spot,
    cache: dict[Path, tuple[str, bool]],
) -> Example:
    shown = []
    for model in models:
        path = evaluation.file(model, spot.prompt, spot.image)
        if path not in cache:
            cache[path] = embed(path)
        own = {reward: float(by_model[model][spot.prompt, spot.image]) for reward, by_model in scores.items()}
        shown.append(Shown(model, *cache[path][:1], own, cache[path][1]))
    return Example(evaluation.settings.prompts[spot.prompt], shown)
