"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, a four-channel VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from smpo_models.family import Conditioning
from smpo_models.family_bases.unet_family import UNetFamily

_OPENCLIP_H_WIDTH = 1024
"""Width of SD 2.x's text encoder; SD 1.x's is 768."""


class StableDiffusion(UNetFamily):
    """See :class:`smpo_models.family.Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)

    def _kind(self, config: Mapping[str, Any]) -> str:
        return "sd2" if config["cross_attention_dim"] == _OPENCLIP_H_WIDTH else "sd15"

    def _load_text(self) -> Sequence[nn.Module]:
        self._tokenizers = [self._load_tokenizer(CLIPTokenizer, "tokenizer")]
        return [self._load_encoder(CLIPTextModel, "text_encoder")]

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """See the base class."""
        return {"text": self.text_modules[0](self._tokens(0, prompts))[0]}

    def conditioning(
        self,
        text: Mapping[str, torch.Tensor],
        sizes: Sequence[tuple[int, int]],  # noqa: ARG002
        crops: Sequence[tuple[int, int]],  # noqa: ARG002
    ) -> Conditioning:
        """See the base class; this family takes no size and no crop."""
        return Conditioning(text["text"])
