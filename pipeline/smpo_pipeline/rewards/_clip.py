"""What the rewards that are a CLIP cosine share: loading, preprocessing, the cosine."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_part, load_weights, loading_errors
from smpo_pipeline.rewards.base import Needs, Reward
from smpo_schemas.errors import UserError
from smpo_schemas.files import sha256_json


class ClipCosineReward(Reward):
    """Cosine between a CLIP model's image and text embeddings, raw: no logit scale, no softmax, no offset.

    Images go through the model's own image processor (its PIL implementation); prompts are cut at the tokenizer's
    length, as the PickScore model card does.
    """

    unit: ClassVar[str] = "cosine"
    needs: ClassVar[Needs] = Needs(num_cpus=2)
    processor_model: ClassVar[str | None] = None
    """Hub id of the processor where the weights' repository holds none."""

    def __init__(self, model: str | None, device: str) -> None:
        self.model = model or str(self.default_model)
        what = f"--reward {self.name}={self.model}"
        with loading_errors(what):
            kind = AutoConfig.from_pretrained(self.model).model_type
        if kind != "clip":
            raise UserError(f"{what} is a {kind!r} model; {self.name} needs a transformers CLIPModel")
        source = self.processor_model if model is None and self.processor_model else self.model
        self._processor = load_part(CLIPImageProcessorPil.from_pretrained, source, what)
        self._tokenizer = load_part(CLIPTokenizer.from_pretrained, source, what)
        loaded = load_weights(CLIPModel.from_pretrained, self.model, what, dtype=torch.float32)
        self._clip = loaded.requires_grad_(False).eval().to(device)
        # A tokenizer keeps its padding as state, which two threads may not set at once.
        self._tokenizing = Lock()
        self._device = device
        self.fingerprint = sha256_json(
            [fingerprint_module(loaded), self._processor.to_dict(), self._tokenizer.get_vocab()]
        )

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class."""
        # The layout is named because it is guessed otherwise, wrongly for images one or three pixels high.
        pixels = self._processor(
            images=[np.asarray(image) for image in images], input_data_format="channels_last", return_tensors="pt"
        ).pixel_values.to(self._device)
        image_ND = self._clip.get_image_features(pixel_values=pixels).pooler_output.double()
        distinct = list(dict.fromkeys(prompts))
        # Every prompt is padded to the full length, so that a score never depends on its neighbours' lengths.
        with self._tokenizing:
            tokens = self._tokenizer(
                distinct,
                padding="max_length",
                truncation=True,
                max_length=self._clip.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self._device)
        text_MD = self._clip.get_text_features(**tokens).pooler_output.double()
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=text_MD.device)
        return torch.nn.functional.cosine_similarity(image_ND, text_MD[rows]).cpu().numpy()
