"""The world's AutoencoderKL: 32x32 pictures to 4x8x8 latents of unit standard deviation, with a wide posterior."""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import AutoencoderKL

from benchmarks.toy_world.training import Report, steps, to_pixels, training_renders

LATENT_CHANNELS = 4

POSTERIOR_STD = 0.35
"""Standard deviation of the posterior; the sampled latents' own is 1.

Wide on purpose: flat pictures lie on a thin manifold, on which a few steps of inversion are ill-posed. The noise of
the posterior gives the manifold the thickness that the grain of photographs gives to theirs.
"""

_MEAN_STD = math.sqrt(1 - POSTERIOR_STD**2)
_BATCH = 64
_STATISTICS_IMAGES = 4096


def train_autoencoder(rng: np.random.Generator, num_steps: int, report: Report) -> AutoencoderKL:
    """Trains an AutoencoderKL on renders of the train split.

    Noise comes from torch's global generator.

    Args:
        rng: draws the pictures.
        num_steps: training steps of 64 pictures.
        report: takes progress lines.

    Returns:
        an autoencoder whose posterior has the fixed standard deviation POSTERIOR_STD and whose sampled latents have
        mean 0 and standard deviation 1 in each channel: its scaling factor is 1.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        force_upcast=False,
    )
    vae.train()
    for make_step in steps("autoencoder", vae.parameters(), num_steps, 2e-3, report):
        pixels = to_pixels(training_renders(_BATCH, rng)[0])
        mean = _raw_mean(vae, pixels)
        # Unit scale by construction while training (as in a batch normalisation): no KL weight to choose.
        centred = (mean - mean.mean((0, 2, 3), keepdim=True)) / (mean.std((0, 2, 3), keepdim=True) + 1e-4)
        latents = _MEAN_STD * centred + POSTERIOR_STD * torch.randn_like(mean)
        decoded = vae.decode(latents).sample
        make_step((decoded - pixels).abs().mean() + (decoded - pixels).square().mean())
    vae.eval()
    _bake_normalisation(vae, to_pixels(training_renders(_STATISTICS_IMAGES, rng)[0]))
    return vae


def _raw_mean(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    return vae.quant_conv(vae.encoder(pixels))[:, :LATENT_CHANNELS]


@torch.no_grad()
def _bake_normalisation(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Moves the scale of the latents and the fixed posterior into the last convolution of the encoder."""
    mean = torch.cat([_raw_mean(vae, batch) for batch in pixels.split(256)])
    scale = _MEAN_STD / mean.std((0, 2, 3))
    shift = mean.mean((0, 2, 3))
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:LATENT_CHANNELS] *= scale[:, None, None, None]
    bias[:LATENT_CHANNELS] = (bias[:LATENT_CHANNELS] - shift) * scale
    weight[LATENT_CHANNELS:] = 0
    bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)
