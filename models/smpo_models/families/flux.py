"""FLUX.1 dev and schnell: a transformer over packed latents, CLIP's pooled embedding and T5.

Follows diffusers' ``pipeline_flux.py``. Shape suffixes: N prompts, B batch, L D a text embedding, C h w a latent, P
tokens of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from smpo_models.arithmetic import input_dtype
from smpo_models.family import Conditioning
from smpo_models.family_bases.packing import PATCH, packed, unpacked
from smpo_models.family_bases.transformer_family import TransformerFamily, even_times

_LATENT_SIDE = 128
"""``default_sample_size`` of the pipeline; the transformer's config names none."""


class Flux(TransformerFamily):
    """See :class:`smpo_models.family.Family`. The denoiser takes packed latents and t / 1000.

    dev was distilled to take a guidance scale as an input, schnell takes none.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = FluxTransformer2DModel
    sampler_times: ClassVar[Callable[[int], np.ndarray] | None] = even_times
    guidance_calls = "never"
    patch = PATCH
    _same_config: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
        "num_layers",
        "num_single_layers",
    )

    def _kind(self, config: Mapping[str, Any]) -> str:
        if not config["guidance_embeds"]:
            # It was trained on 256 text tokens; the pipeline's default is 512.
            self.sampler_steps, self.usual_guidance, self._text_tokens = 4, None, 256
            return "flux1-schnell"
        # 1 is no guidance: the scale at which the model's own trajectories can be inverted.
        self.embedded_guidance = 1.0
        self.usual_guidance, self._text_tokens = 3.5, 512
        return "flux1-dev"

    def to_pipeline(self, x_BChw: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return packed(x_BChw)

    def from_pipeline(self, latents: torch.Tensor, height: int, width: int, vae: nn.Module) -> torch.Tensor:  # noqa: ARG002
        """See the base class."""
        return unpacked(latents, height, width)

    def _latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"]) // PATCH**2

    def _latent_side(self, config: Mapping[str, Any]) -> int:  # noqa: ARG002
        return _LATENT_SIDE

    def _load_text(self) -> Sequence[nn.Module]:
        self._tokenizers = [
            self._load_tokenizer(CLIPTokenizer, "tokenizer"),
            self._load_tokenizer(T5TokenizerFast, "tokenizer_2"),
        ]
        return [
            self._load_encoder(CLIPTextModel, "text_encoder"),
            self._load_encoder(T5EncoderModel, "text_encoder_2"),
        ]

    def _text_limits(self) -> Sequence[int]:
        return [super()._text_limits()[0], self._text_tokens]

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        clip, t5 = self.text_modules
        return {"text": t5(self._tokens(1, prompts))[0], "pooled": clip(self._tokens(0, prompts)).pooler_output}

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype, (height, width) = input_dtype(denoiser, x_BChw.device), x_BChw.shape[-2:]
        text_BLD = conditioning.text_BLD.to(dtype)
        scale, guidance_B = self.embedded_guidance, None
        if scale is not None:
            guidance_B = torch.full_like(t_B, scale, dtype=torch.float32)
        output_BPD = denoiser(
            hidden_states=packed(x_BChw.to(dtype)),
            timestep=t_B / self.noise_schedule.num_train_timesteps,
            guidance=guidance_B,
            pooled_projections=conditioning.added["pooled"].to(dtype),
            encoder_hidden_states=text_BLD,
            txt_ids=text_BLD.new_zeros(text_BLD.shape[1], 3),
            img_ids=_positions(height, width, text_BLD),
        ).sample
        return unpacked(output_BPD, height, width).float()


def _positions(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return 0, row and column of each token, in the order of :func:`packed`: [P, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(like.device, like.dtype)
