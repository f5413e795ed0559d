"""A tiny random Lumina 2 in the diffusers folder layout, made without the network.

Latents are 4 x 8 x 8, images 32 x 32, as in :mod:`tests.tiny.stable_diffusion`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tests.tiny.language import LANGUAGE_WIDTH, make_gemma2, make_gemma_tokenizer
from tests.tiny.stable_diffusion import LATENT_SHAPE, make_tiny_vae


def make_tiny_lumina2(path: Path, seed: int = 0, **scheduler) -> Path:
    """Write the model folder; the same seed gives the same weights. Returns ``path``.

    Args:
        path: of the folder.
        seed: of the weights.
        scheduler: settings in place of the published ones, a static shift of 6.
    """
    tokenizer = make_gemma_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = Lumina2Transformer2DModel(
            sample_size=LATENT_SHAPE[-1],
            in_channels=LATENT_SHAPE[0],
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 32, 32),
            cap_feat_dim=LANGUAGE_WIDTH,
        )
        vae = make_tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)
        encoder = make_gemma2(tokenizer)
    Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 6.0} | scheduler),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(path)
    return path
