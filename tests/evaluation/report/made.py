"""Results of an evaluation that nothing was sampled or scored for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smpo_pipeline.evaluation.report.write import write_report
from smpo_pipeline.evaluation.results import ModelEntry, Results, RewardEntry, Settings, find_all
from tests.pictures import picture

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MODELS = ("base", "smpo", "dpo", "worse-one")
GAINS = {"base": 0.0, "smpo": 0.8, "dpo": 0.05, "worse-one": -0.8}
REWARDS = ("pickscore", "hpsv2")
CATEGORIES = ("animals", "food & drink", "")
HOSTILE = '</script><script>alert("a")</script> <b>bold</b> {{ 7 * 7 }} and a very-long-word-' + "m" * 80


@dataclass(frozen=True)
class Made:
    """A report, and what it was made from; ``scores``: per reward and model, [P, I]."""

    path: Path
    results: Results
    scores: dict[str, dict[str, np.ndarray]]


def make_report(
    folder: Path,
    models: Sequence[str] = MODELS,
    prompts: int = 45,
    images: int = 2,
    categories: bool = True,
    size: tuple[int, int] = (40, 30),
) -> Made:
    """Write a report of random scores and pictures; a model's gain is the same under all rewards."""
    rng = np.random.default_rng(0)
    texts = [f"prompt {number} of a {'cat' if number % 3 else 'dog'}" for number in range(prompts)]
    texts[1] = HOSTILE
    scores = {
        reward: {model: 20 + GAINS[model] + rng.normal(size=(prompts, images)) for model in models}
        for reward in REWARDS
    }
    files = {
        model: _pictures(folder / "images" / model, number, prompts, images, size)
        for number, model in enumerate(models)
    }
    settings = Settings(
        models=dict.fromkeys(models, "0" * 8),
        rewards={reward: reward for reward in REWARDS},
        prompts=texts,
        images_per_prompt=images,
        steps=20,
        guidance_scale=7.5,
        seed=0,
        dtype="fp32",
        categories=[CATEGORIES[number % len(CATEGORIES)] for number in range(prompts)] if categories else None,
    )
    results = Results(
        schema_version=1,
        digest=settings.digest(),
        settings=settings,
        num_prompts=prompts,
        num_images=prompts * images,
        baseline=models[0],
        models=[_entry(model) for model in models],
        rewards=[RewardEntry(name=name, unit="logit", model=f"owner/{name}", fingerprint="f" * 64) for name in REWARDS],
        findings=find_all(scores, models[0]),
        versions={"smpo-diffusion": "0.2.0", "torch": "2.11"},
    )
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": n, "loss": 0.7 - n / 100}) + "\n" for n in range(1, 9)))
    write_report(folder, results, scores, files, {models[-1]: metrics})
    return Made(folder / "report.html", results, scores)


def _entry(model: str) -> ModelEntry:
    if model == "base":
        return ModelEntry(name=model, source=BASE, base=None, denoiser="d" * 64)
    training = {"objective": model, "beta": 2000 if model == "smpo" else 5000, "steps": 2000, "data": "shards/pickapic"}
    return ModelEntry(
        name=model,
        source=f"runs/{model}",
        base=BASE,
        denoiser="e" * 64,
        training=training,
        trained_rewards=["pickscore"],
    )


def _pictures(folder: Path, model: int, prompts: int, images: int, size: tuple[int, int]) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{prompt:05d}-{image:02d}.png" for prompt in range(prompts) for image in range(images)]
    for number, path in enumerate(paths):
        picture(*size, seed=1000 * model + number).save(path)
    return paths
