"""Tiny random models of the transformer families with one text encoder: PixArt-Sigma, Z-Image, Sana.

In the diffusers folder layout, made without the network. Latents are 4 x 8 x 8, images 32 x 32, as in
:mod:`tests.tiny.stable_diffusion`.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import AddedToken

from tests.tiny.flow import T5_WIDTH, make_t5
from tests.tiny.language import LANGUAGE_WIDTH, make_gemma2, make_gemma_tokenizer, make_qwen3, make_qwen_tokenizer
from tests.tiny.stable_diffusion import LATENT_SHAPE, make_tiny_vae

_SOLVER = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "beta_schedule": "linear"}
"""The multistep solver that PixArt-Sigma's and Sana's pipelines sample with."""


def make_tiny_pixart(path: Path, seed: int = 0, **transformer) -> Path:
    """Write a PixArt-Sigma folder; the same seed gives the same weights. Returns ``path``.

    Args:
        path: of the folder.
        seed: of the weights.
        transformer: settings of its config in place of those here; by default it predicts a variance, too.
    """
    config = {"out_channels": 2 * LATENT_SHAPE[0], **transformer}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = PixArtTransformer2DModel(
            sample_size=LATENT_SHAPE[-1],
            in_channels=LATENT_SHAPE[0],
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            cross_attention_dim=32,
            caption_channels=T5_WIDTH,
            **config,
        )
        vae = make_tiny_vae(scaling_factor=0.13025)
        encoder, tokenizer = make_t5()
    PixArtSigmaPipeline(
        transformer=denoiser,
        scheduler=DPMSolverMultistepScheduler(**_SOLVER, beta_start=0.0001, beta_end=0.02),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(path)
    return path


def make_tiny_z_image(path: Path, seed: int = 0, **scheduler) -> Path:
    """Write a Z-Image folder; the same seed gives the same weights. Returns ``path``.

    Args:
        path: of the folder.
        seed: of the weights.
        scheduler: settings in place of a static shift of 3.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = ZImageTransformer2DModel(
            in_channels=LATENT_SHAPE[0],
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=LANGUAGE_WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        )
        # Zeros until they are trained, which would hide them.
        for token in (denoiser.x_pad_token, denoiser.cap_pad_token):
            torch.nn.init.normal_(token)
        tokenizer = make_qwen_tokenizer()
        encoder = make_qwen3(tokenizer, 3).model
        vae = make_tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)
    ZImagePipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(path)
    return path


def make_tiny_sana(path: Path, seed: int = 0, *, patch: int = 1, **scheduler) -> Path:
    """Write a Sana folder; the same seed gives the same weights. Returns ``path``.

    Args:
        path: of the folder.
        seed: of the weights.
        patch: side, in latent positions, of a token.
        scheduler: settings in place of the published kind.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = SanaTransformer2DModel(
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=LANGUAGE_WIDTH,
            sample_size=LATENT_SHAPE[-1],
            patch_size=patch,
        )
        tokenizer = make_gemma_tokenizer()
        # Single letters would make a thousand tokens of the pipeline's instruction.
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        words = sorted(set(re.findall(r" ?\w+", "\n".join(instruction))))
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
        encoder, vae = make_gemma2(tokenizer), make_tiny_dc()
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    SanaPipeline(
        transformer=denoiser,
        scheduler=DPMSolverMultistepScheduler(**_SOLVER | flow | scheduler),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    ).save_pretrained(path)
    return path


def make_tiny_dc() -> AutoencoderDC:
    """Make a random autoencoder without a posterior, from torch's global generator."""
    layers = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 16, 16),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), (5,)),
        }.items()
    }
    return AutoencoderDC(latent_channels=LATENT_SHAPE[0], attention_head_dim=8, scaling_factor=0.41407, **layers)
