"""A reward with a linear head on top, the output of ``smpo-pipeline refresh`` (APO's reward player, arXiv 2311.08045).

r' = r + v . phi, with r the base reward and phi the product, entry by entry, of the normalised embeddings of image and
prompt by a frozen CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from smpo_common.errors import UserError
from smpo_common.files import sha256_file, sha256_json
from smpo_models.weights import loading_errors
from smpo_pipeline.rewards import Needs, Reward, load_reward
from smpo_pipeline.rewards.networks.clip import ClipCosineReward, clip_of, cosine, products
from smpo_schemas.scoring.refresh import HEAD_FILE, REFRESH_FILE, read_refresh


class Refreshed(Reward):
    """The base reward plus the head; the model is the folder that ``refresh`` wrote.

    Attributes:
        clip: the CLIP of the head.
    """

    name: ClassVar[str] = "refreshed"
    unit: ClassVar[str] = "the base reward's"
    default_model: ClassVar[str | None] = None
    needs: ClassVar[Needs] = Needs(threads=2, num_gpus=0.5)
    clip: ClipCosineReward

    def __init__(self, model: str | None, device: str) -> None:
        what = f"--reward {self.name}={model}"
        if model is None or not (Path(model) / REFRESH_FILE).is_file():
            raise UserError(f"{what}: give a folder that `smpo-pipeline refresh` wrote: refreshed=DIR")
        info, head = read_refresh(Path(model)), Path(model) / HEAD_FILE
        self.model = model
        self.unit = info.unit  # type: ignore[misc]
        self._base = load_reward(info.reward, device)
        clip = clip_of(load_reward(info.features, device) if info.features else self._base)
        with loading_errors(f"{what}: {HEAD_FILE}"):
            changed = sha256_file(head) != info.head.sha256
            v_D = load_file(head)["v"]
        found = (self._base.fingerprint, clip.fingerprint if clip else None)
        if changed or found != (info.fingerprint, info.clip_fingerprint):
            part = "its head" if changed else f"{info.reward}{f' or {info.features}' if info.features else ''}"
            raise UserError(f"{what}: {part} has changed since; refresh again")
        assert clip is not None  # noqa: S101  (for mypy: its fingerprint is the recorded one)
        self.clip, self._v_D = clip, v_D.to(device)
        self.fingerprint = sha256_json([*found, info.head.sha256])

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class."""
        embeddings = self.clip.embed(self.clip.pixels(images), prompts)
        base = cosine(*embeddings) if self.clip is self._base else self._base.score(images, prompts)
        return base + (products(*embeddings) @ self._v_D).cpu().numpy()
