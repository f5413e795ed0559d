"""The base class of rewards that are a CLIP cosine."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.fingerprint import fingerprint_module
from smpo_models.weights import load_part, load_tokenizer, load_weights, loading_errors
from smpo_pipeline.rewards.base import Needs, Reward
from smpo_pipeline.rewards.networks.pixels import cropped

_PAD_MULTIPLE = 16
# CLIP attends causally, so padding changes no score. Padding all prompts to 77 made texts as expensive as images.

_HIGHEST = 2
"""A config with this end token makes CLIPModel take the highest token id as the end, as old checkpoints need."""


class ClipCosineReward(Reward):
    """Raw cosine of a CLIP model's image and text embeddings: no logit scale, no softmax, no offset.

    Images go through the PIL version of the model's image processor; prompts are truncated at the tokenizer's length,
    as in the PickScore model card.
    """

    unit: ClassVar[str] = "cosine"
    needs: ClassVar[Needs] = Needs(threads=2)
    processor_model: ClassVar[str | None] = None
    """Hub id of the processor, if the default model's repository has none."""

    def __init__(self, model: str | None, device: str) -> None:
        self.model = model or str(self.default_model)
        what = f"--reward {self.name}={self.model}"
        kind = load_part(AutoConfig.from_pretrained, self.model, what).model_type
        if kind != "clip":
            raise UserError(f"{what} is a {kind!r} model; {self.name} needs a transformers CLIPModel")
        source = self.processor_model if self.model == self.default_model and self.processor_model else self.model
        self._processor = load_part(CLIPImageProcessorPil.from_pretrained, source, what)
        self._tokenizer = load_tokenizer(CLIPTokenizer.from_pretrained, source, what)
        loaded = load_weights(
            CLIPModel.from_pretrained, self.model, what, dtype=torch.float32, ignore_mismatched_sizes=True
        )
        _check_fit(self._processor, self._tokenizer, loaded.config, what)
        self._clip = loaded.requires_grad_(False).eval().to(device)
        # A tokenizer stores its padding setting, so two threads must not call it at once.
        self._tokenizing = Lock()
        self._max_tokens = self._clip.config.text_config.max_position_embeddings
        self._device = device
        text, vision = loaded.config.text_config, loaded.config.vision_config
        self.fingerprint = sha256_json(
            [
                fingerprint_module(loaded),
                tower_settings(text),
                text.eos_token_id,
                tower_settings(vision),
                self._processor.to_dict(),
                self._tokenizer.backend_tokenizer.to_str(),
            ]
        )

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class."""
        return cosine(*self.embed(self.pixels(images), prompts))

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Resize, crop and normalise images as the model takes them: float32 [N, 3, side, side]; thread-safe."""
        # Without the layout the processor guesses it, wrongly for images one or three pixels high.
        return self._processor(
            images=[np.asarray(image) for image in images], input_data_format="channels_last", return_tensors="pt"
        ).pixel_values

    def score_tensor(self, images_N3HW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """See the base class."""
        of_images = (self._processor.image_mean, self._processor.image_std)
        mean, std = (torch.tensor(value, device=self._device).view(3, 1, 1) for value in of_images)
        side = self._clip.config.vision_config.image_size
        pixels = (cropped(images_N3HW.to(self._device), side) - mean) / std
        return torch.nn.functional.cosine_similarity(*self._embed(pixels, prompts))

    @torch.inference_mode()
    def embed(self, pixels_N3hw: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed N images and their prompts: float64 [N, D] each, as the projections leave them, not normalised."""
        return self._embed(pixels_N3hw, prompts)

    def _embed(self, pixels_N3hw: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        image_ND = self._clip.get_image_features(pixel_values=pixels_N3hw.to(self._device)).pooler_output.double()
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        return image_ND, self._text_features(list(rows))[[rows[prompt] for prompt in prompts]]

    def _text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Encode M distinct prompts: float64 [M, D].

        Each prompt is padded to the next multiple of :data:`_PAD_MULTIPLE`, independently of the other prompts, so that
        its score does not depend on them. Attention is causal: padding does not change the result. Padding all prompts
        to the tokenizer's full length would make short prompts as expensive as long ones.
        """
        with self._tokenizing:
            ids = self._tokenizer(prompts, truncation=True, max_length=self._max_tokens).input_ids
        lengths = [min(self._max_tokens, -(-len(tokens) // _PAD_MULTIPLE) * _PAD_MULTIPLE) for tokens in ids]
        features: list[torch.Tensor] = [torch.empty(0)] * len(ids)
        for length in sorted(set(lengths)):
            rows = [row for row, padded in enumerate(lengths) if padded == length]
            padding = [[self._tokenizer.pad_token_id] * (length - len(ids[row])) for row in rows]
            batch = torch.tensor([ids[row] + more for row, more in zip(rows, padding, strict=True)])
            features_MD = self._clip.get_text_features(input_ids=batch.to(self._device)).pooler_output.double()
            for row, feature in zip(rows, features_MD, strict=True):
                features[row] = feature
        return torch.stack(features)


def clip_of(reward: Reward) -> ClipCosineReward | None:
    """Return the CLIP that a reward is, or has as its attribute ``clip``; None: it has none."""
    return reward if isinstance(reward, ClipCosineReward) else getattr(reward, "clip", None)


def cosine(image_ND: torch.Tensor, text_ND: torch.Tensor) -> np.ndarray:
    """Return the cosine of each image and its prompt, float64 [N]."""
    return torch.nn.functional.cosine_similarity(image_ND, text_ND).cpu().numpy()


def products(image_ND: torch.Tensor, text_ND: torch.Tensor) -> torch.Tensor:
    """Multiply normalised embeddings of images and prompts entry by entry: [N, D]; their sum over D is the cosine."""
    return torch.nn.functional.normalize(image_ND) * torch.nn.functional.normalize(text_ND)


def tower_settings(config: CLIPTextConfig | CLIPVisionConfig) -> dict[str, float | str]:
    """Return the settings, besides sizes and weights, that a tower's output depends on."""
    return {name: getattr(config, name) for name in ("hidden_act", "layer_norm_eps", "num_attention_heads")}


def _check_fit(processor: CLIPImageProcessorPil, tokenizer: CLIPTokenizer, config: CLIPConfig, what: str) -> None:
    """Check that image processor and tokenizer fit the model.

    Raises:
        UserError: they are another model's, so that scoring would fail or give wrong scores.
    """
    tokens, vocabulary = max(tokenizer.get_vocab().values()) + 1, config.text_config.vocab_size
    if tokens > vocabulary:
        raise UserError(f"{what}: the tokenizer has {tokens} tokens, the model {vocabulary}")
    end = config.text_config.eos_token_id
    if tokenizer.eos_token_id != (tokens - 1 if end == _HIGHEST else end):
        model_end = "the highest token" if end == _HIGHEST else f"token {end}"
        raise UserError(
            f"{what}: the tokenizer ends a prompt with token {tokenizer.eos_token_id}, the model expects {model_end}"
        )
    with loading_errors(f"{what}: its image processor"):
        # Not a square, so that a processor that does not crop is found out.
        pixels = processor(images=[np.zeros((8, 5, 3), np.uint8)], input_data_format="channels_last").pixel_values[0]
    side = config.vision_config.image_size
    if pixels.shape != (3, side, side):
        shape = " x ".join(str(length) for length in pixels.shape)
        raise UserError(f"{what}: the image processor returns {shape}, the model takes 3 x {side} x {side}")
