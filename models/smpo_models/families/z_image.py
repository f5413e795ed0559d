"""Z-Image: a transformer over one sequence of image and text, and Qwen3.

Follows diffusers' ``pipeline_z_image.py``. Shape suffixes: N prompts, B batch, C h w a latent, L D a text embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ZImageTransformer2DModel
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Model

from smpo_common.errors import UserError
from smpo_models.arithmetic import input_dtype
from smpo_models.family import Conditioning
from smpo_models.family_bases.masked_text import rows, without_padding
from smpo_models.family_bases.transformer_family import TransformerFamily, even_times
from smpo_schemas.shards.text_rows import MASK

_LATENT_SIDE = 128
"""Latent side of the pipeline's default 1024 pixels; the transformer's config names none."""

_PATCH = 2
"""Side of a token, in latent positions: of the transformer's ``all_patch_size``, the one that the pipeline uses."""


class ZImage(TransformerFamily):
    """See :class:`smpo_models.family.Family`. The denoiser takes 1 - t / 1000, and predicts x0 - noise.

    Nothing in a model's folder tells Z-Image-Turbo, which was distilled to 8 steps without guidance, from Z-Image.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = ZImageTransformer2DModel
    sampler_times: ClassVar[Callable[[int], np.ndarray] | None] = even_times
    guidance_calls = "conditional first"
    sampler_steps = 50
    # The pipeline's 5: it counts no guidance as 0, we count it as 1.
    usual_guidance = 6.0
    patch = _PATCH
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
    )
    _text_width: ClassVar[str] = "cap_feat_dim"
    _text_tokens = 512
    _same_config: ClassVar[tuple[str, ...]] = ("in_channels", "dim", "cap_feat_dim", "n_layers", "n_refiner_layers")

    def _kind(self, config: Mapping[str, Any]) -> str:
        if _PATCH not in config["all_patch_size"]:
            raise UserError(f"{self._what}: its transformer has all_patch_size {config['all_patch_size']}, without 2")
        return "z-image"

    def _latent_side(self, config: Mapping[str, Any]) -> int:  # noqa: ARG002
        return _LATENT_SIDE

    def resolution_limits(self) -> tuple[int, int | None]:
        """See the base class; its table of positions ends at the largest side."""
        smallest, _ = super().resolution_limits()
        return smallest, min(self._config["axes_lens"][1:]) * self.resolution_multiple()

    def sampling_options(self, guidance_scale: float | None, images: int) -> dict[str, Any]:
        """See the base class; the pipeline's scale for no guidance is 0, not 1."""
        return super().sampling_options(None if guidance_scale is None else guidance_scale - 1, images)

    def _load_text(self) -> Sequence[nn.Module]:
        self._tokenizers = [self._load_tokenizer(Qwen2Tokenizer, "tokenizer")]
        return [self._load_encoder(Qwen3Model, "text_encoder", dtype="auto")]

    def _text_limits(self) -> Sequence[int]:
        return [self._text_tokens]

    def _as_read(self, prompt: str) -> str:
        return self._tokenizers[0].apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        tokens_NL, mask_NL = self._tokens_and_mask(0, prompts)
        states = self.text_modules[0](input_ids=tokens_NL, attention_mask=mask_NL.bool(), output_hidden_states=True)
        return without_padding(states.hidden_states[-2], mask_NL.bool())

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype, steps = input_dtype(denoiser, x_BChw.device), self.noise_schedule.num_train_timesteps
        outputs = denoiser(
            x=list(x_BChw.to(dtype).unsqueeze(2)),
            t=(steps - t_B) / steps,
            cap_feats=rows(conditioning.text_BLD.to(dtype), conditioning.added.get(MASK)),
        ).sample
        return -torch.stack(outputs).squeeze(2).float()
