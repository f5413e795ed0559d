"""LAION's improved aesthetic predictor v2: a small head on the image embedding of OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CLIPModel

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.fingerprint import fingerprint_module
from smpo_models.weights import load_weights
from smpo_pipeline.rewards.base import Needs, Reward
from smpo_pipeline.rewards.networks.clip import tower_settings
from smpo_pipeline.rewards.networks.pixels import clip_pixels, cropped, normalise
from smpo_pipeline.rewards.networks.weights import find_checkpoint, read_checkpoint

_CLIP = "openai/clip-vit-large-patch14"
_CLIP_FILES = ("model.safetensors", "pytorch_model.bin")
_LAYER = re.compile(r"layers\.(\d+)\.(?:weight|bias)")


class Aesthetic(Reward):
    """Rates how pleasing an image looks, from about 1 to 10; the prompt is ignored.

    The model is the head: a file, a folder that holds it, or OWNER/REPO/FILE on the hub. If the folder also holds a
    CLIP (config.json), this CLIP is used, otherwise OpenAI's ViT-L/14 from the hub.
    """

    name: ClassVar[str] = "aesthetic"
    unit: ClassVar[str] = "rating from 1 to 10"
    default_model: ClassVar[str | None] = None
    needs: ClassVar[Needs] = Needs(threads=2)

    def __init__(self, model: str | None, device: str) -> None:
        if model is None:
            fix = "aesthetic=PATH of sac+logos+ava1-l14-linearMSE.pth, from the authors' repository"
            raise UserError(f"--reward {self.name}: the authors did not publish the head on the hub; give {fix}")
        self.model = model
        what = f"--reward {self.name}={self.model}"
        checkpoint = find_checkpoint(self.model, what, ignore=_CLIP_FILES)
        head = _head(read_checkpoint(checkpoint, what), what)
        source = str(checkpoint.parent) if (checkpoint.parent / "config.json").is_file() else _CLIP
        clip = load_weights(
            CLIPModel.from_pretrained, source, f"{what}: {source}", dtype=torch.float32, ignore_mismatched_sizes=True
        )
        if clip.config.projection_dim != head[0].in_features:
            sizes = f"{clip.config.projection_dim} dimensions, the head takes {head[0].in_features}"
            raise UserError(f"{what}: the image embedding of {source} has {sizes}")
        # Drop the text tower, which no score depends on.
        self._tower = clip.vision_model.requires_grad_(False).eval().to(device)
        self._projection = clip.visual_projection.requires_grad_(False).to(device)
        self._head = head.requires_grad_(False).eval().to(device)
        self._side = clip.config.vision_config.image_size
        self._device = device
        weights = fingerprint_module(self._tower, self._projection, self._head)
        self.fingerprint = sha256_json([weights, tower_settings(clip.config.vision_config)])

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002
        """See the base class."""
        pixels = torch.stack([clip_pixels(image, self._side) for image in images]).to(self._device)
        return self._ratings(pixels).double().cpu().numpy()

    def score_tensor(self, images_N3HW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:  # noqa: ARG002
        """See the base class."""
        return self._ratings(normalise(cropped(images_N3HW.to(self._device), self._side)))

    def _ratings(self, pixels_N3hw: torch.Tensor) -> torch.Tensor:
        """Return the ratings of N preprocessed images, float32 [N]."""
        embedding_ND = self._projection(self._tower(pixel_values=pixels_N3hw).pooler_output)
        # Half precision would round a rating of about 5 to multiples of 1/32.
        with torch.autocast(self._device, enabled=False):
            return self._head(nn.functional.normalize(embedding_ND.float())).squeeze(1)


def _head(state: dict[str, torch.Tensor], what: str) -> nn.Sequential:
    """Build the head: linear layers without activations (the authors train with dropout between them).

    Raises:
        UserError: the file is not such a head.
    """
    numbers = sorted({int(match[1]) for name in state if (match := _LAYER.fullmatch(name))})
    names = [f"layers.{number}.{kind}" for number in numbers for kind in ("weight", "bias")]
    if not names or set(names) != set(state):
        other = min(set(state) ^ set(names), default="nothing")
        raise UserError(
            f"{what} is not an aesthetic head (layers.N.weight, layers.N.bias); the first difference: {other}"
        )
    head = nn.Sequential()
    for number in numbers:
        weight, bias = state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:  # noqa: PLR2004  (a matrix)
            raise UserError(f"{what} is not an aesthetic head: layers.{number} is not a linear layer")
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data, layer.bias.data = weight, bias
        head.append(layer)
    sizes = [(layer.in_features, layer.out_features) for layer in head]
    if any(before[1] != after[0] for before, after in pairwise(sizes)) or sizes[-1][1] != 1:
        shown = ", ".join(f"{inputs} to {outputs}" for inputs, outputs in sizes)
        raise UserError(f"{what} is not an aesthetic head: its layers map {shown}")
    return head
