"""Stable Diffusion XL: two text encoders, a pooled embedding, size and crop conditioning (arXiv 2307.01952).

Shape suffixes: N prompts, B batch, L D a text embedding, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from smpo_models.family import Conditioning
from smpo_models.family_bases.clip_text import pooled_in_float64
from smpo_models.family_bases.unet_family import UNetFamily
from smpo_models.weights import load_part


class StableDiffusionXL(UNetFamily):
    """See :class:`smpo_models.family.Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)

    def _kind(self, config: Mapping[str, Any]) -> str:  # noqa: ARG002
        return "sdxl"

    def _load_text(self) -> Sequence[nn.Module]:
        index = load_part(DiffusionPipeline.load_config, self._model, self._what)
        self._zeros_for_empty = bool(index.get("force_zeros_for_empty_prompt", True))
        self._tokenizers = [self._load_tokenizer(CLIPTokenizer, name) for name in ("tokenizer", "tokenizer_2")]
        return [
            self._load_encoder(CLIPTextModel, "text_encoder"),
            pooled_in_float64(self._load_encoder(CLIPTextModelWithProjection, "text_encoder_2")),
        ]

    def text_settings(self) -> dict[str, Any]:
        """See the base class."""
        return super().text_settings() | {"zeros_for_empty_prompt": self._zeros_for_empty}

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """See the base class.

        The empty prompt stands for the unconditional embedding that the model's pipeline guides with: zeros, where its
        ``force_zeros_for_empty_prompt`` says so, as the published model does, and ``encodes_empty_prompt`` is off.
        """
        states = [
            encoder(self._tokens(number, prompts), output_hidden_states=True)
            for number, encoder in enumerate(self.text_modules)
        ]
        text_NLD = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
        pooled_ND = states[1].text_embeds
        if self._zeros_for_empty and not self.encodes_empty_prompt:
            empty = [row for row, prompt in enumerate(prompts) if not prompt]
            text_NLD[empty] = 0.0
            pooled_ND[empty] = 0.0
        return {"text": text_NLD, "pooled": pooled_ND}

    def longest_text(self, prompts: int) -> dict[str, torch.Tensor]:
        """See the base class."""
        pooled = self._encoder_config(CLIPTextModelWithProjection, "text_encoder_2").projection_dim
        return super().longest_text(prompts) | {"pooled": torch.zeros(prompts, pooled)}

    def conditioning(
        self, text: Mapping[str, torch.Tensor], sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]]
    ) -> Conditioning:
        """See the base class."""
        origin = [[*size, *crop] for size, crop in zip(sizes, crops, strict=True)]
        origin_B4 = torch.tensor(origin, dtype=torch.float32, device=self._device)
        return Conditioning(text["text"], {"text_embeds": text["pooled"], "time_ids": origin_B4})

    def _added(self, x_BChw: torch.Tensor, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        """Return the pooled embedding, and original size, crop and target size (that of the decoded latents)."""
        origin_B4 = conditioning.added["time_ids"]
        target = [side * self.latent_factor for side in x_BChw.shape[-2:]]
        target_B2 = origin_B4.new_tensor(target).expand(len(origin_B4), 2)
        return {
            "text_embeds": conditioning.added["text_embeds"],
            "time_ids": torch.cat([origin_B4, target_B2], dim=1),
        }
