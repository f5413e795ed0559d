"""Qwen-Image (arXiv 2508.02324): a transformer over packed latents, Qwen2.5-VL, a video autoencoder.

Follows diffusers' ``pipeline_qwenimage.py``. Shape suffixes: N prompts, B batch, L D a text embedding, C h w a latent,
P tokens of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from smpo_common.errors import UserError
from smpo_models.arithmetic import input_dtype
from smpo_models.autoencoders.base import Autoencoder
from smpo_models.autoencoders.qwen_image import QwenImageAutoencoder
from smpo_models.family import Conditioning
from smpo_models.family_bases.masked_text import without_padding
from smpo_models.family_bases.packing import PATCH, packed, unpacked
from smpo_models.family_bases.transformer_family import TransformerFamily, even_times
from smpo_schemas.shards.text_rows import MASK

_LATENT_SIDE = 128
"""``default_sample_size`` of the pipeline; the transformer's config names none."""

_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_TEMPLATE_TOKENS = 34
"""Tokens of the template before the prompt; the pipeline drops their embeddings."""

_UNCONDITIONAL = " "
"""The negative prompt in the examples of the pipeline's documentation. Without one, the pipeline does not guide."""

_OTHER_MODELS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of transformers that take more than noisy latents and text, as those that edit images do."""


class QwenImage(TransformerFamily):
    """See :class:`smpo_models.family.Family`. The denoiser takes packed latents and t / 1000.

    With guidance, the pipeline rescales the prediction for each token to the norm of the conditional one; trajectories
    of ``invert`` follow plain guidance.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = QwenImageTransformer2DModel
    autoencoder: ClassVar[Autoencoder] = QwenImageAutoencoder()
    sampler_times: ClassVar[Callable[[int], np.ndarray] | None] = even_times
    guidance_calls = "separate"
    sampler_steps = 50
    usual_guidance = 4.0
    patch = PATCH
    _text_tokens = 512
    _same_config: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels", "joint_attention_dim", "num_layers")

    def _kind(self, config: Mapping[str, Any]) -> str:
        for setting in _OTHER_MODELS:
            if config[setting]:
                raise UserError(
                    f"{self._what}: its transformer's config sets {setting}, as models that edit images or draw layers "
                    "do; only text-to-image models are known"
                )
        # The last block's text output is dropped, so that these layers have no effect.
        last = f"transformer_blocks.{config['num_layers'] - 1}"
        self.idle_layers = (f"{last}.attn.to_add_out", f"{last}.txt_mlp")
        return "qwen-image"

    def _latent_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"]) // PATCH**2

    def _latent_side(self, config: Mapping[str, Any]) -> int:  # noqa: ARG002
        return _LATENT_SIDE

    def _load_text(self) -> Sequence[nn.Module]:
        self._tokenizers = [self._load_tokenizer(Qwen2Tokenizer, "tokenizer")]
        return [self._load_encoder(Qwen2_5_VLForConditionalGeneration, "text_encoder", dtype="auto")]

    def _text_limits(self) -> Sequence[int]:
        return [_TEMPLATE_TOKENS + self._text_tokens]

    def _as_read(self, prompt: str) -> str:
        instead = "" if self.encodes_empty_prompt else _UNCONDITIONAL
        return _TEMPLATE.format(prompt or instead)

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """See the base class.

        The empty prompt stands for the one that the model's pipeline guides with, where ``encodes_empty_prompt`` is
        off.
        """
        tokens_NL, mask_NL = self._tokens_and_mask(0, prompts, padding="longest")
        # Skip the language model's head, whose logits the pipeline computes and drops.
        output = self.text_modules[0].model(tokens_NL, attention_mask=mask_NL, use_cache=False)
        is_template_NL = mask_NL.cumsum(1) <= _TEMPLATE_TOKENS
        return without_padding(output.last_hidden_state, mask_NL.bool() & ~is_template_NL)

    def conditioning(
        self,
        text: Mapping[str, torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        crops: Sequence[tuple[int, int]],
    ) -> Conditioning:
        """See the base class; a mask without padding is left out, as in the pipeline: attention is faster without."""
        needed = {name: value for name, value in text.items() if name != MASK or not value.all()}
        return super().conditioning(needed, sizes, crops)

    def sampling_options(self, guidance_scale: float | None, images: int) -> dict[str, Any]:
        """See the base class; without a negative prompt the pipeline does not guide."""
        options = super().sampling_options(None, images)
        if guidance_scale is None or guidance_scale <= 1:
            return options | {"true_cfg_scale": 1.0}
        negative = [_UNCONDITIONAL] * images
        return options | {"true_cfg_scale": guidance_scale, "negative_prompt": negative}

    def to_pipeline(self, x_BChw: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return packed(x_BChw)

    def from_pipeline(self, latents: torch.Tensor, height: int, width: int, vae: nn.Module) -> torch.Tensor:  # noqa: ARG002
        """See the base class."""
        return unpacked(latents, height, width)

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype, (height, width) = input_dtype(denoiser, x_BChw.device), x_BChw.shape[-2:]
        output_BPD = denoiser(
            hidden_states=packed(x_BChw.to(dtype)),
            timestep=t_B / self.noise_schedule.num_train_timesteps,
            encoder_hidden_states=conditioning.text_BLD.to(dtype),
            encoder_hidden_states_mask=conditioning.added.get(MASK),
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x_BChw),
        ).sample
        return unpacked(output_BPD, height, width).float()
