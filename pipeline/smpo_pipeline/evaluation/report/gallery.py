"""Select the images that the report shows side by side: the largest losses and gains, and some drawn at random.

Shape suffixes: P prompts, I images per prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from smpo_pipeline.evaluation.report.tables import Scores
from smpo_pipeline.evaluation.results import Results

_EXTREMES = 6
_RANDOM = 12
_SELECTION_SEED = 0


@dataclass(frozen=True)
class Spot:
    """One image of a comparison: the prompt's number and the image's number within it."""

    prompt: int
    image: int


@dataclass(frozen=True)
class Selection:
    """A model's largest gains and losses against the baseline under one reward; a list has a prompt at most once."""

    best: list[Spot]
    worst: list[Spot]


@dataclass(frozen=True)
class Shown:
    """One image: the model that made it, its file, and its scores by reward."""

    model: str
    path: Path
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Example:
    """Images of several models from the same prompt and noise."""

    prompt: str
    category: str
    shown: list[Shown]


@dataclass(frozen=True)
class Gallery:
    """A titled list of examples; ``note`` says how they were selected."""

    title: str
    note: str
    examples: list[Example]


@dataclass(frozen=True)
class Section:
    """Galleries under one title; those in ``folded`` are closed at first."""

    title: str
    galleries: list[Gallery]
    folded: list[Gallery] = field(default_factory=list)

    def paths(self) -> Iterator[Path]:
        """Yield the files of all its images."""
        for gallery in [*self.galleries, *self.folded]:
            for example in gallery.examples:
                yield from (shown.path for shown in example.shown)


def select_extremes(difference_PI: np.ndarray) -> Selection:
    """Select the largest gains and losses; the lists are shorter if fewer prompts gain or lose."""
    gains, losses = _per_prompt(difference_PI), _per_prompt(-difference_PI)
    return Selection(best=gains[:_EXTREMES], worst=losses[:_EXTREMES])


def _per_prompt(difference_PI: np.ndarray) -> list[Spot]:
    """List each prompt's largest difference, if positive, in descending order."""
    image_P = difference_PI.argmax(axis=1)
    value_P = difference_PI.max(axis=1)
    return [Spot(int(p), int(image_P[p])) for p in np.argsort(-value_P, kind="stable") if value_P[p] > 0]


def select_random(num_prompts: int, images_per_prompt: int) -> list[Spot]:
    """Draw images of different prompts with a fixed seed, regardless of scores."""
    rng = np.random.default_rng(_SELECTION_SEED)
    prompts = rng.permutation(num_prompts)[:_RANDOM]
    return [Spot(int(prompt), int(rng.integers(images_per_prompt))) for prompt in prompts]


def select_sections(results: Results, scores: Scores, files: Mapping[str, Sequence[Path]]) -> list[Section]:
    """Select each model's largest losses and gains against the baseline, then images of all models at random.

    Args:
        results: the evaluation's results.
        scores: of all images.
        files: per model, its images' files, prompt by prompt.
    """
    settings = results.settings

    def gallery(title: str, note: str, models: Sequence[str], spots: Sequence[Spot]) -> Gallery:
        examples = []
        for spot in spots:
            position = spot.prompt * settings.images_per_prompt + spot.image
            shown = []
            for model in models:
                own = {reward: float(by_model[model][spot.prompt, spot.image]) for reward, by_model in scores.items()}
                shown.append(Shown(model, files[model][position], own))
            category = settings.categories[spot.prompt] if settings.categories else ""
            examples.append(Example(settings.prompts[spot.prompt], category, shown))
        return Gallery(title, note, examples)

    def extremes(model: str, reward: str) -> list[Gallery]:
        by_model, note = scores[reward], f"by difference in {reward}, at most one image per prompt"
        chosen = select_extremes(by_model[model] - by_model[results.baseline])
        pair = (results.baseline, model)
        return [
            gallery(f"Worst regressions under {reward}", note, pair, chosen.worst),
            gallery(f"Largest gains under {reward}", note, pair, chosen.best),
        ]

    names = [model.name for model in results.models]
    sections = []
    for model in names[1:]:
        first, *others = [extremes(model, reward) for reward in scores]
        folded = [each for galleries in others for each in galleries]
        sections.append(Section(f"{results.baseline} and {model}, side by side", first, folded))
    spots = select_random(results.num_prompts, settings.images_per_prompt)
    random = gallery(f"{len(spots)} images of different prompts", "regardless of scores", names, spots)
    return [*sections, Section("Drawn at random", [random])]
