"""Sana (arXiv 2410.10629): a linear transformer over latents of a deep autoencoder, and Gemma 2.

Follows diffusers' ``pipeline_sana.py``. Shape suffixes: N prompts, B batch, C h w a latent.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import nn
from transformers import Gemma2Model, GemmaTokenizer

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.arithmetic import input_dtype
from smpo_models.autoencoders.base import Autoencoder
from smpo_models.autoencoders.dc import DCAutoencoder
from smpo_models.family import Conditioning
from smpo_models.family_bases.masked_text import without_padding
from smpo_models.family_bases.transformer_family import TransformerFamily
from smpo_schemas.shards.text_rows import MASK

_MULTIPLE = 32
"""The pipeline only takes sides that are multiples of this many pixels, whatever its autoencoder."""


class Sana(TransformerFamily):
    """See :class:`smpo_models.family.Family`. The denoiser takes latents and t in [0, 1000).

    Each prompt follows the pipeline's instruction to the language model. The denoiser is given the embeddings of the
    first token and of all from the instruction's last token on. The empty prompt stands for the pipeline's negative
    prompt, which has no instruction; with ``encodes_empty_prompt`` it gets one like any other.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = SanaTransformer2DModel
    autoencoder: ClassVar[Autoencoder] = DCAutoencoder()
    guidance_calls = "unconditional first"
    sampler_steps = 20
    usual_guidance = 4.5
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    _text_width: ClassVar[str] = "caption_channels"
    _text_tokens = 300
    _same_config: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "caption_channels",
        "patch_size",
        "num_layers",
        "timestep_scale",
    )

    def _kind(self, config: Mapping[str, Any]) -> str:
        if config["guidance_embeds"]:
            raise UserError(
                f"{self._what}: its transformer is told a guidance scale (guidance_embeds), as Sana Sprint's is; its "
                "pipeline tells it none"
            )
        self.patch = int(config["patch_size"])
        return "sana"

    def resolution_multiple(self) -> int:
        """See the base class."""
        return math.lcm(super().resolution_multiple(), _MULTIPLE)

    def sampling_options(self, guidance_scale: float | None, images: int) -> dict[str, Any]:
        """See the base class; the pipeline's table of sizes is not used: images have the size that was asked for."""
        return super().sampling_options(guidance_scale, images) | {"use_resolution_binning": False}

    def _load_text(self) -> Sequence[nn.Module]:
        tokenizer = self._load_tokenizer(GemmaTokenizer, "tokenizer")
        self._tokenizers = [tokenizer]
        if tokenizer:  # not loaded where configs alone are read
            tokenizer.padding_side = "right"
            instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
            self._instruction = "\n".join(instruction)
            self._instruction_tokens = len(tokenizer.encode(self._instruction))
        return [self._load_encoder(Gemma2Model, "text_encoder", dtype="auto")]

    def text_settings(self) -> dict[str, Any]:
        """See the base class."""
        return super().text_settings() | {"instruction": sha256_json(self._instruction)}

    def _text_limits(self) -> Sequence[int]:
        return [self._instruction_tokens + self._text_tokens - 2]

    def _as_read(self, prompt: str) -> str:
        is_negative = not prompt and not self.encodes_empty_prompt
        return "" if is_negative else self._instruction + prompt.lower().strip()

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        tokens_NL, mask_NL = self._tokens_and_mask(0, prompts)
        states_NLD = self.text_modules[0](tokens_NL, attention_mask=mask_NL)[0]
        kept = [0, *range(1 - self._text_tokens, 0)]
        return without_padding(states_NLD[:, kept], mask_NL[:, kept].bool())

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype, channels = input_dtype(denoiser, x_BChw.device), x_BChw.shape[1]
        told_B = t_B.floor() if self.noise_schedule.cuts_times else t_B
        output = denoiser(
            hidden_states=x_BChw.to(dtype),
            encoder_hidden_states=conditioning.text_BLD.to(dtype),
            encoder_attention_mask=conditioning.added.get(MASK),
            timestep=told_B * self._config["timestep_scale"],
        ).sample
        return output[:, :channels].float()
