"""Rewards that need no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from smpo_pipeline.evaluation.evaluation import Evaluation
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
