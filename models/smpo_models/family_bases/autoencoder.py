"""AutoencoderKL: its latents, normalised by one shift and one scale, as diffusers' pipelines do.

Shape suffixes: B batch, C h w a latent, H W an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from diffusers import AutoencoderKL

from smpo_common.errors import UserError
from smpo_models.part_config import complete, subfolder
from smpo_models.weights import load_part, load_weights

ENCODED_PIXELS = 1 << 21
"""Pixels that the VAE encodes at once, two images of 1024 or eight of 512. Its first layers keep three float32 maps of
128 channels, 1.5 kB a pixel: all images of a batch at once would need more memory than the denoiser does."""

_NORMALISED = ("latents_mean", "latents_std")
"""Of VAEs whose latents are scaled channel by channel."""


def vae_config(model: str, vae: str | None, channels: int, what: str) -> dict[str, Any]:
    """Read the config of the VAE to be used.

    Args:
        model: hub id or folder.
        vae: hub id or folder of a VAE in place of the model's own.
        channels: of the latents that the model's denoiser takes.
        what: names the model in errors.

    Raises:
        UserError: its latents are not those that the denoiser was trained on.
    """
    source, named = (vae, f"--vae {vae}") if vae else (model, what)
    found = complete(
        AutoencoderKL, load_part(AutoencoderKL.load_config, source, named, **subfolder("vae", vae is None))
    )
    _check_latents(found, named)
    if found["latent_channels"] != channels:
        raise UserError(
            f"{named}: the VAE has {found['latent_channels']} latent channels, the denoiser of {what} takes {channels}"
        )
    if vae is None:
        return found
    own = found
    with suppress(UserError):  # a model that comes without a VAE
        own = load_part(AutoencoderKL.load_config, model, what, subfolder="vae")
    own = complete(AutoencoderKL, own)
    if vae_factor(found) != vae_factor(own):
        raise UserError(
            f"--vae {vae} makes one latent of {vae_factor(found)} pixels a side, the VAE of {what} of "
            f"{vae_factor(own)}; name one that was made for this model"
        )
    for name in ("scaling_factor", "shift_factor", *_NORMALISED):
        if found[name] != own[name]:
            raise UserError(
                f"--vae {vae} has {name} {found[name]}, the VAE of {what} {own[name]}: "
                "its latents are not what this denoiser knows; name one that was made for this model"
            )
    return found


def _check_latents(config: Mapping[str, Any], what: str) -> None:
    """Check that latents are scaled by one number.

    Raises:
        UserError: they are not.
    """
    for name in _NORMALISED:
        if config.get(name) is not None:
            raise UserError(
                f"{what}: its VAE's config sets {name}; only VAEs that scale all channels alike, "
                "by scaling_factor and shift_factor, are known"
            )


def load_vae(model: str, vae: str | None, variant: str | None, what: str) -> AutoencoderKL:
    """Load the VAE in float32; see :func:`vae_config` for the arguments."""
    return load_weights(
        AutoencoderKL.from_pretrained,
        vae or model,
        f"--vae {vae}" if vae else what,
        variant=None if vae else variant,
        torch_dtype=torch.float32,
        **subfolder("vae", vae is None),
    )


def vae_factor(config: Mapping[str, Any]) -> int:
    """Return the pixels of a latent position, along one side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the posterior, normalised: (z - shift_factor) scaling_factor."""
    images = max(1, ENCODED_PIXELS // pixels_B3HW[0, 0].numel())
    parts = [vae.encode(part.to(vae.device)).latent_dist for part in pixels_B3HW.split(images)]
    mean, std = (torch.cat(each) for each in zip(*((part.mean, part.std) for part in parts), strict=True))
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
    return (mean - shift) * scale, std * scale


@torch.no_grad()
def decode(vae: AutoencoderKL, latents_BChw: torch.Tensor) -> torch.Tensor:
    """Return the images of normalised latents: float32 [B, 3, H, W], clamped to [-1, 1]."""
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
    return vae.decode(latents_BChw.to(vae.device) / scale + shift).sample.clamp(-1, 1)
