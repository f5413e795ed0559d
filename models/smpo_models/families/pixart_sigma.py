"""PixArt-Sigma (arXiv 2403.04692): a transformer that predicts noise, and T5.

Follows diffusers' ``pipeline_pixart_sigma.py``. Shape suffixes: N prompts, B batch, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn
from transformers import T5EncoderModel, T5TokenizerFast

from smpo_common.errors import UserError
from smpo_models.arithmetic import input_dtype
from smpo_models.family import Conditioning
from smpo_models.family_bases.masked_text import without_padding
from smpo_models.family_bases.transformer_family import TransformerFamily
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_models.noise_schedules.variance_preserving import load_variance_preserving
from smpo_schemas.shards.text_rows import MASK

_ALPHA_SIDE = 128
"""Latent side of PixArt-Alpha: at this ``sample_size``, diffusers' transformer takes the image's size by default."""


class PixArtSigma(TransformerFamily):
    """See :class:`smpo_models.family.Family`. The denoiser takes latents and whole timesteps as they are.

    If the output has twice the channels, their second half is a variance that the samplers do not use. Prompts are
    lowercased, as the pipeline does without ``clean_caption``, an option that rewrites prompts in a way that depends on
    whether two optional packages are installed. The pipeline's table of sizes is not used: images have the size that
    was asked for. diffusers has no LoRA for the denoiser.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = PixArtTransformer2DModel
    guidance_calls = "unconditional first"
    sampler_steps = 20
    usual_guidance = 4.5
    lora_targets: ClassVar[tuple[str, ...]] = ()
    _text_width: ClassVar[str] = "caption_channels"
    _text_tokens = 300
    _same_config: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "caption_channels",
        "patch_size",
        "num_layers",
    )

    def _kind(self, config: Mapping[str, Any]) -> str:
        takes_size = config["use_additional_conditions"]
        if config["sample_size"] == _ALPHA_SIDE if takes_size is None else takes_size:
            raise UserError(
                f"{self._what}: its transformer takes the image's size (use_additional_conditions), as PixArt-Alpha's "
                "does; its pipeline tells it none"
            )
        self.patch = int(config["patch_size"])
        return "pixart-sigma"

    def _load_schedule(self) -> NoiseSchedule:
        return load_variance_preserving(self._model, self._what)

    def sampling_options(self, guidance_scale: float | None, images: int) -> dict[str, Any]:
        """See the base class."""
        return super().sampling_options(guidance_scale, images) | {
            "clean_caption": False,
            "use_resolution_binning": False,
        }

    def _load_text(self) -> Sequence[nn.Module]:
        self._tokenizers = [self._load_tokenizer(T5TokenizerFast, "tokenizer")]
        return [self._load_encoder(T5EncoderModel, "text_encoder")]

    def _text_limits(self) -> Sequence[int]:
        return [self._text_tokens]

    def _as_read(self, prompt: str) -> str:
        return prompt.lower().strip()

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        tokens_NL, mask_NL = self._tokens_and_mask(0, prompts)
        return without_padding(self.text_modules[0](tokens_NL, attention_mask=mask_NL)[0], mask_NL.bool())

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype, channels = input_dtype(denoiser, x_BChw.device), x_BChw.shape[1]
        output = denoiser(
            hidden_states=x_BChw.to(dtype),
            timestep=t_B,
            encoder_hidden_states=conditioning.text_BLD.to(dtype),
            encoder_attention_mask=conditioning.added.get(MASK),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return output[:, :channels].float()
