"""FLUX.2-klein, the base models of 4B and 9B parameters: a transformer over patches of latents, and Qwen3.

Follows diffusers' ``pipeline_flux2_klein.py``. Shape suffixes: N prompts, B batch, L D a text embedding, C h w a
latent, P tokens of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from smpo_common.errors import UserError
from smpo_models.arithmetic import input_dtype
from smpo_models.autoencoders.base import Autoencoder
from smpo_models.autoencoders.flux2 import Flux2Autoencoder
from smpo_models.family import Conditioning
from smpo_models.family_bases.transformer_family import TransformerFamily, even_times
from smpo_models.weights import load_part
from smpo_schemas.shards.text_rows import TEXT

_LATENT_SIDE = 64
"""Half of the pipeline's ``default_sample_size``, which counts the VAE's own latents; the config names none."""

_LAYERS = (9, 18, 27)
"""Layers of the language model whose outputs, side by side, are the text embedding."""

_VAE = Flux2Autoencoder()


class Flux2Klein(TransformerFamily):
    """See :class:`smpo_models.family.Family`. The denoiser takes one token per latent position, and t / 1000.

    The padding of texts is a real input: the pipeline does not mask it.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = Flux2Transformer2DModel
    autoencoder: ClassVar[Autoencoder] = _VAE
    sampler_times: ClassVar[Callable[[int], np.ndarray] | None] = even_times
    sampler_mu: ClassVar[Callable[[int, int], float] | None] = compute_empirical_mu
    sampler_steps = 50
    usual_guidance = 4.0
    guidance_calls = "separate"
    # The projections of the double-stream blocks, and the fused one before attention of the single-stream blocks.
    lora_targets: ClassVar[tuple[str, ...]] = (*TransformerFamily.lora_targets, "attn.to_qkv_mlp_proj")
    _text_tokens = 512
    _same_config: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "joint_attention_dim",
        "guidance_embeds",
        "num_layers",
        "num_single_layers",
    )

    def _kind(self, config: Mapping[str, Any]) -> str:
        if load_part(DiffusionPipeline.load_config, self._model, self._what).get("is_distilled"):
            raise UserError(
                f"{self._what} is a FLUX.2-klein that was distilled to a few steps (is_distilled in model_index.json), "
                "which training by the error of a flow would undo; take its base model, FLUX.2-klein-base"
            )
        if config["guidance_embeds"]:
            raise UserError(f"{self._what}: its transformer takes a guidance scale, which no FLUX.2-klein does")
        return "flux2-klein"

    def _latent_side(self, config: Mapping[str, Any]) -> int:  # noqa: ARG002
        return _LATENT_SIDE

    def _load_text(self) -> Sequence[nn.Module]:
        self._tokenizers = [self._load_tokenizer(Qwen2Tokenizer, "tokenizer")]
        return [self._load_encoder(Qwen3ForCausalLM, "text_encoder", dtype="auto")]

    def _text_limits(self) -> Sequence[int]:
        return [self._text_tokens]

    def _as_read(self, prompt: str) -> str:
        return self._tokenizers[0].apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        tokens_NL, mask_NL = self._tokens_and_mask(0, prompts)
        # Skip the language model's head, whose logits the pipeline computes and drops.
        output = self.text_modules[0].model(
            tokens_NL, attention_mask=mask_NL, output_hidden_states=True, use_cache=False
        )
        return {TEXT: torch.cat([output.hidden_states[layer] for layer in _LAYERS], dim=-1)}

    def from_pipeline(self, latents: torch.Tensor, height: int, width: int, vae: nn.Module) -> torch.Tensor:  # noqa: ARG002
        """See the base class; the pipeline gives the VAE's own latents."""
        return _VAE.normalised(vae, latents)

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype, (height, width) = input_dtype(denoiser, x_BChw.device), x_BChw.shape[-2:]
        text_BLD = conditioning.text_BLD.to(dtype)
        output_BPC = denoiser(
            hidden_states=x_BChw.to(dtype).flatten(2).transpose(1, 2),
            timestep=t_B / self.noise_schedule.num_train_timesteps,
            encoder_hidden_states=text_BLD,
            txt_ids=_positions(text_BLD, length=text_BLD.shape[1]),
            img_ids=_positions(x_BChw, height, width),
        ).sample
        return output_BPC.transpose(1, 2).reshape(x_BChw.shape).float()


def _positions(like: torch.Tensor, height: int = 1, width: int = 1, length: int = 1) -> torch.Tensor:
    """Return 0, row, column and place in the text of each token: [B, tokens, 4]."""
    ranges = [torch.arange(count, device=like.device) for count in (1, height, width, length)]
    return torch.cartesian_prod(*ranges).expand(len(like), -1, -1)
