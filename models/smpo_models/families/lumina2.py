"""Lumina-Image 2.0 (arXiv 2503.21758): a transformer over one sequence of text and image, and Gemma 2.

Follows diffusers' ``pipeline_lumina2.py``. Shape suffixes: N prompts, B batch, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import Lumina2Transformer2DModel
from torch import nn
from transformers import Gemma2Model, GemmaTokenizer

from smpo_models.arithmetic import input_dtype
from smpo_models.family import Conditioning
from smpo_models.family_bases.masked_text import without_padding
from smpo_models.family_bases.transformer_family import TransformerFamily, even_times
from smpo_schemas.shards.text_rows import MASK

_SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)


class Lumina2(TransformerFamily):
    """See :class:`smpo_models.family.Family`. The denoiser takes 1 - t / 1000, and predicts x0 - noise.

    Each prompt follows the pipeline's system prompt. The empty prompt stands for the pipeline's negative prompt, which
    has no system prompt; with ``encodes_empty_prompt`` it gets one like any other. With guidance, the pipeline rescales
    each row of the prediction to the norm of the conditional one; trajectories of ``invert`` follow plain guidance.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("Lumina2Pipeline",)
    denoiser_class: ClassVar[type[nn.Module]] = Lumina2Transformer2DModel
    sampler_times: ClassVar[Callable[[int], np.ndarray] | None] = even_times
    sampler_steps = 30
    usual_guidance = 4.0
    guidance_calls = "separate"
    lora_targets: ClassVar[tuple[str, ...]] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    _text_width: ClassVar[str] = "cap_feat_dim"
    _text_tokens = 256
    _same_config: ClassVar[tuple[str, ...]] = ("in_channels", "cap_feat_dim", "patch_size", "num_layers", "hidden_size")

    def _kind(self, config: Mapping[str, Any]) -> str:
        self.patch = int(config["patch_size"])
        return "lumina2"

    def resolution_limits(self) -> tuple[int, int | None]:
        """See the base class; its table of positions ends at the largest side."""
        smallest, _ = super().resolution_limits()
        return smallest, min(self._config["axes_lens"][1:]) * self.resolution_multiple()

    def num_tokens(self, height: int, width: int) -> int:  # noqa: ARG002
        """See the base class; the pipeline does not pack latents, and takes their channels for the number of tokens."""
        return self._channels

    def _load_text(self) -> Sequence[nn.Module]:
        tokenizer = self._load_tokenizer(GemmaTokenizer, "tokenizer")
        self._tokenizers = [tokenizer]
        if tokenizer:  # not loaded where configs alone are read
            tokenizer.padding_side = "right"
        return [self._load_encoder(Gemma2Model, "text_encoder", dtype="auto")]

    def _text_limits(self) -> Sequence[int]:
        return [self._text_tokens]

    def _as_read(self, prompt: str) -> str:
        return _SYSTEM + prompt if prompt or self.encodes_empty_prompt else ""

    @torch.no_grad()
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        tokens_NL, mask_NL = self._tokens_and_mask(0, prompts)
        states = self.text_modules[0](tokens_NL, attention_mask=mask_NL, output_hidden_states=True)
        return without_padding(states.hidden_states[-2], mask_NL.bool())

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype, text_BLD = input_dtype(denoiser, x_BChw.device), conditioning.text_BLD
        mask_BL = conditioning.added.get(MASK)
        is_known = mask_BL is not None and not mask_BL.is_meta
        if mask_BL is None:
            mask_BL = text_BLD.new_ones(text_BLD.shape[:2], dtype=torch.bool)
        with nullcontext() if is_known else _full_texts(denoiser):
            output = denoiser(
                hidden_states=x_BChw.to(dtype),
                timestep=1 - t_B / self.noise_schedule.num_train_timesteps,
                encoder_hidden_states=text_BLD.to(dtype),
                encoder_attention_mask=mask_BL,
            ).sample
        return -output.float()


class _FullTexts:
    """Stands for a mask without padding, whose lengths the denoiser reads, when tensors have no values."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def sum(self, dim: int) -> _FullTexts:  # noqa: ARG002
        return self

    def tolist(self) -> list[int]:
        rows, length = self.shape
        return [length] * rows


@contextmanager
def _full_texts(denoiser: Any) -> Iterator[None]:  # noqa: ANN401  (has a module of this name)
    hook = denoiser.rope_embedder.register_forward_pre_hook(lambda _, inputs: (inputs[0], _FullTexts(inputs[1].shape)))
    try:
        yield
    finally:
        hook.remove()
