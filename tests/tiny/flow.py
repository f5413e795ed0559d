"""Tiny random flow-matching models (SD3, SD3.5, FLUX.1) in the diffusers folder layout, made without the network.

Latents are 4 x 8 x 8, images 32 x 32, as in :mod:`tests.tiny.stable_diffusion`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny.stable_diffusion import LATENT_SHAPE, make_text_config, make_tiny_vae, make_tokenizer

T5_WIDTH = 72
"""Wider than both CLIP encoders' embeddings side by side."""

_CLIP_WIDTH = 32
_POOLED_WIDTH = 16


def make_tiny_sd3(path: Path, seed: int = 0, *, version: str = "3.5", t5: bool = True, **scheduler) -> Path:
    """Write the model folder; the same seed gives the same weights. Returns ``path``.

    Args:
        path: of the folder.
        seed: of the weights.
        version: 3.5 normalises queries and keys, and has a second attention in its first block; 3 has neither.
        t5: without, the folder has no third text encoder.
        scheduler: settings in place of the published ones, a static shift of 3.
    """
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if version == "3.5" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SHAPE[-1],
            patch_size=2,
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * _POOLED_WIDTH,
            pos_embed_max_size=16,
            **newer,
        )
        tokenizer = make_tokenizer()
        clips = [CLIPTextModelWithProjection(make_text_config(tokenizer, hidden_act=act)) for act in ("gelu", "relu")]
        vae = make_tiny_vae(scaling_factor=1.5305, shift_factor=0.0609)
        encoder, words = make_t5() if t5 else (None, None)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=make_tokenizer(padded_with="!"),
        text_encoder_3=encoder,
        tokenizer_3=words,
    ).save_pretrained(path)
    return path


def make_tiny_flux(path: Path, seed: int = 0, *, guided: bool = True, **scheduler) -> Path:
    """Write a FLUX.1 folder: dev, which takes a guidance scale, or schnell, which takes none. Returns ``path``.

    Args:
        path: of the folder.
        seed: of the weights.
        guided: dev.
        scheduler: settings in place of the published ones: a dynamic shift (dev), or none (schnell).
    """
    published = {"use_dynamic_shifting": True, "shift": 3.0} if guided else {"shift": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT_SHAPE[0],
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=_CLIP_WIDTH,
            guidance_embeds=guided,
            axes_dims_rope=(4, 4, 8),
        )
        tokenizer = make_tokenizer()
        clip = CLIPTextModel(make_text_config(tokenizer))
        vae = make_tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)
        encoder, words = make_t5()
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**published | scheduler),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=words,
    ).save_pretrained(path)
    return path


def make_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Make a random encoder, from torch's global generator, and a tokenizer of single letters and two words."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [(chr(code), -5.0) for code in range(ord("!"), 127)]
    words = [("\u2581", -3.0), ("\u2581cat", -1.0), ("\u2581dog", -1.0)]
    tokenizer = T5TokenizerFast(vocab=[*special, *letters, *words], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config), tokenizer
