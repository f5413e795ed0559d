"""Tiny random Qwen-Image and FLUX.2-klein, which read prompts with Qwen's language models; made without the network.

Latents are 4 x 8 x 8, images 32 x 32, as in :mod:`tests.tiny.stable_diffusion`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.tiny.language import LANGUAGE_WIDTH, make_qwen3, make_qwen_tokenizer, make_qwen_vl
from tests.tiny.stable_diffusion import IMAGE_SIDE, LATENT_SHAPE

_CHANNELS = LATENT_SHAPE[0]
_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
"""Qwen-Image's, as far as it differs from the library's defaults."""

_KLEIN_LAYERS = 27
"""Of the language model: the pipeline takes the states after the 9th, the 18th and the 27th."""


def make_tiny_qwen_image(path: Path, seed: int = 0, **scheduler) -> Path:
    """Write the model folder; the same seed gives the same weights. Returns ``path``.

    Args:
        path: of the folder.
        seed: of the weights.
        scheduler: settings in place of the published ones.
    """
    tokenizer = make_qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            in_channels=4 * _CHANNELS,
            out_channels=_CHANNELS,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=LANGUAGE_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=_CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[-0.76, -0.71, 0.11, 1.55],
            latents_std=[2.82, 1.45, 2.33, 0.66],
        )
        encoder = make_qwen_vl(tokenizer)
    QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**_SHIFT | scheduler),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(path)
    return path


def make_tiny_klein(path: Path, seed: int = 0, *, distilled: bool = False, **scheduler) -> Path:
    """Write a FLUX.2-klein folder; the same seed gives the same weights. Returns ``path``.

    Args:
        path: of the folder.
        seed: of the weights.
        distilled: the model that samples in four steps without guidance, by a flag of its pipeline.
        scheduler: settings in place of the published ones.
    """
    tokenizer = make_qwen_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * LANGUAGE_WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=_CHANNELS // 4,
            sample_size=IMAGE_SIDE,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        encoder = make_qwen3(tokenizer, _KLEIN_LAYERS)
    Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, "shift": 3.0} | scheduler),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        is_distilled=distilled,
    ).save_pretrained(path)
    return path
