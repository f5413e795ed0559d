"""Rewards that need no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from rich.console import Console

from smpo_pipeline.evaluation import run as run_module
from smpo_pipeline.evaluation.evaluation import Evaluation
from smpo_pipeline.evaluation.results import Results
from smpo_pipeline.jobs.evaluate.sampling import sample_model
from smpo_pipeline.rewards import Reward

EvaluationMaker = Callable[..., Evaluation]


class Brightness(Reward):
    name: ClassVar[str] = "brightness"
    unit: ClassVar[str] = "grey level"
    default_model: ClassVar[str | None] = None

    def __init__(self, model: str | None, device: str) -> None:  # noqa: ARG002
        self.model = self.fingerprint = "stub"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        assert len(images) == len(prompts)
        return np.array([np.asarray(image, dtype=np.float64).mean() for image in images])


class Redness(Brightness):
    name: ClassVar[str] = "redness"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002
        return np.array([np.asarray(image, dtype=np.float64)[..., 0].mean() for image in images])


class Broken(Brightness):
    name: ClassVar[str] = "broken"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002
        return np.full(len(images), np.nan)


STUBS = {each.name: each for each in (Brightness, Redness, Broken)}


def run(evaluation: Evaluation, console: Console) -> Results:
    """Run an evaluation as the command does."""
    return run_module.run(evaluation, console, sample_model)


def write_training(folder: Path, rewards: Mapping[str, float]) -> None:
    """Write the ``training.json`` of a run that learned from rewards, by name and weight."""
    mix = {name: {"weight": weight, "scale": 1.0, "model": "stub"} for name, weight in rewards.items()}
    record = {
        "schema_version": 1,
        "settings": {"beta": 2000, "lr": 1e-5, "lora_rank": None, "seed": 0},
        "model": "base",
        "objective": "smpo",
        "rewards": mix,
        "shards": [{"path": name, "manifest_sha256": name} for name in ("a", "b")],
        "states_per_step": 8,
        "steps": 200,
        "epochs": 1.5,
        "versions": {"smpo-diffusion": "0.2.0"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(record))
