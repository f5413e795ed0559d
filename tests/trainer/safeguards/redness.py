"""A reward that needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from smpo_pipeline.rewards import Reward


class Redness(Reward):
    """The mean of the red channel, plus the length of the prompt; a prompt "none" has no score."""

    name, unit, default_model = "redness", "levels", None

    def __init__(self, model: str | None, device: str) -> None:
        self.model, self.fingerprint = model or "none", f"redness on {device}"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        red = [float(np.asarray(image)[..., 0].mean()) for image in images]
        return np.array([np.nan if p == "none" else r + len(p) for r, p in zip(red, prompts, strict=True)])


REDNESS = f"{__name__}:Redness"
