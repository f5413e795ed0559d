"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer, two CLIP and one T5 text encoder.

Follows diffusers' ``pipeline_stable_diffusion_3.py``. Shape suffixes: N prompts, B batch, L D a text embedding, C h w a
latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from smpo_models.arithmetic import input_dtype
from smpo_models.family import Conditioning
from smpo_models.family_bases.clip_text import pooled_in_float64
from smpo_models.family_bases.transformer_family import TransformerFamily
from smpo_models.weights import load_part
from smpo_schemas.shards.text_rows import TEXT


class StableDiffusion3(TransformerFamily):
    """See :class:`smpo_models.family.Family`. The denoiser takes latents and t in [0, 1000) as they are.

    Without its third encoder, which users leave out to save memory, T5's embeddings are zeros, as in the pipeline. T5's
    padding is kept: the pipeline does not mask it.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = SD3Transformer2DModel
    guidance_calls = "unconditional first"
    _text_tokens = 256
    _same_config: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "joint_attention_dim",
        "pooled_projection_dim",
        "patch_size",
        "num_layers",
    )

    def _kind(self, config: Mapping[str, Any]) -> str:
        self.patch = int(config["patch_size"])
        # Stable Diffusion 3.5 normalises queries and keys, 3 does not.
        kind = "sd35" if config["qk_norm"] else "sd3"
        self.usual_guidance = 4.5 if kind == "sd35" else 7.0
        return kind

    def resolution_limits(self) -> tuple[int, int | None]:
        """See the base class; its position embeddings end at the largest side."""
        smallest, _ = super().resolution_limits()
        return smallest, int(self._config["pos_embed_max_size"]) * self.resolution_multiple()

    def _load_text(self) -> Sequence[nn.Module]:
        self._tokenizers = [self._load_tokenizer(CLIPTokenizer, name) for name in ("tokenizer", "tokenizer_2")]
        encoders = [
            pooled_in_float64(self._load_encoder(CLIPTextModelWithProjection, name))
            for name in ("text_encoder", "text_encoder_2")
        ]
        index = load_part(DiffusionPipeline.load_config, self._model, self._what)
        if all(index.get("text_encoder_3", ())):
            self._tokenizers.append(self._load_tokenizer(T5TokenizerFast, "tokenizer_3"))
            encoders.append(self._load_encoder(T5EncoderModel, "text_encoder_3"))
        return encoders

    def _text_limits(self) -> Sequence[int]:
        return [*super()._text_limits()[:2], self._text_tokens][: len(self._tokenizers)]

    def longest_text(self, prompts: int) -> dict[str, torch.Tensor]:
        """See the base class; CLIP's tokens come before T5's."""
        tokens = self._encoder_config(CLIPTextModelWithProjection, "text_encoder").max_position_embeddings
        text = super().longest_text(prompts)
        return text | {TEXT: functional.pad(text[TEXT], (0, 0, tokens, 0))}

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return CLIP's embeddings side by side, widened by zeros to T5's, followed by T5's; and both pooled ones."""
        clips, t5 = self.text_modules[:2], self.text_modules[2:]
        states = [
            encoder(self._tokens(number, prompts), output_hidden_states=True) for number, encoder in enumerate(clips)
        ]
        clip_NLD = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
        width = int(self._config["joint_attention_dim"])
        t5_NLD = (
            t5[0](self._tokens(2, prompts))[0] if t5 else clip_NLD.new_zeros(len(prompts), self._text_tokens, width)
        )
        clip_NLD = functional.pad(clip_NLD, (0, width - clip_NLD.shape[-1]))
        return {
            "text": torch.cat([clip_NLD, t5_NLD], dim=1),
            "pooled": torch.cat([state.text_embeds for state in states], dim=-1),
        }

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype = input_dtype(denoiser, x_BChw.device)
        return denoiser(
            hidden_states=x_BChw.to(dtype),
            timestep=t_B,
            encoder_hidden_states=conditioning.text_BLD.to(dtype),
            pooled_projections=conditioning.added["pooled"].to(dtype),
        ).sample.float()
