"""The toy world's exact true reward. For evaluation only: training on it would be cheating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.rewards.base import Reward
from smpo_pipeline.toy.truth import true_reward


class ToyTruth(Reward):
    """Measures how well an image shows a caption of the toy world, from 0 to 1."""

    name: ClassVar[str] = "toy-truth"
    unit: ClassVar[str] = "share of a perfect render"
    default_model: ClassVar[str | None] = None

    def __init__(self, model: str | None, device: str) -> None:  # noqa: ARG002
        if model is not None:
            raise UserError(f"--reward {self.name}={model}: this reward is computed in code and takes no model")
        self.model = self.fingerprint = "smpo_pipeline.toy.truth"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class.

        Raises:
            UserError: a prompt is not a caption of the toy world.
        """
        try:
            return true_reward([np.asarray(image) for image in images], list(prompts))
        except ValueError as error:
            raise UserError(f"--reward {self.name}: {error}") from error
