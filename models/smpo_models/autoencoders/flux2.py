"""AutoencoderKLFlux2: patches of 2 x 2 positions become channels, which a batch norm's statistics normalise.

Follows diffusers' ``pipeline_flux2_klein.py``. Shape suffixes: B batch, C h w a latent; Z y x the VAE's own, with
C = 4Z, y = 2h, x = 2w.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2
from torch import nn
from torch.nn import functional

from smpo_common.errors import UserError
from smpo_models.autoencoders.base import Autoencoder

_PATCH = 2


class Flux2Autoencoder(Autoencoder):
    """See the base class.

    The pipelines take the mean of the posterior for an image's latent, so its standard deviation counts as zero.
    """

    vae_class: ClassVar[type[nn.Module]] = AutoencoderKLFlux2
    normalisation: ClassVar[tuple[str, ...]] = ("batch_norm_eps",)

    def channels(self, config: Mapping[str, Any]) -> int:
        """See the base class."""
        return int(config["latent_channels"]) * _PATCH**2

    def factor(self, config: Mapping[str, Any]) -> int:
        """See the base class."""
        return 2 ** (len(config["block_out_channels"]) - 1) * _PATCH

    def check(self, config: Mapping[str, Any], what: str) -> None:
        """See the base class; the pipelines know one size of patches."""
        if list(config["patch_size"]) != [_PATCH, _PATCH]:
            raise UserError(f"{what}: its VAE's config sets patch_size {config['patch_size']}; only 2 x 2 is known")

    def normalised(self, vae: Any, z_BZyx: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """Return the VAE's own latents in patches and normalised: [B, C, h, w]."""
        mean_1C11, std_1C11 = _statistics(vae, z_BZyx)
        return (functional.pixel_unshuffle(z_BZyx, _PATCH) - mean_1C11) / std_1C11

    def _moments(self, vae: Any, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        mean_BChw = self.normalised(vae, vae.encode(pixels_B3HW).latent_dist.mode())
        return mean_BChw, torch.zeros_like(mean_BChw)

    def _decode(self, vae: Any, latents_BChw: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        mean_1C11, std_1C11 = _statistics(vae, latents_BChw)
        return vae.decode(functional.pixel_shuffle(latents_BChw * std_1C11 + mean_1C11, _PATCH)).sample

    def set_tile(self, vae: Any, side: int) -> None:  # noqa: ANN401
        """See the base class."""
        super().set_tile(vae, side)
        vae.tile_latent_min_size = side * _PATCH
        vae.tile_sample_min_size = side * self.factor(vae.config)


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    """Return the mean and standard deviation of each channel over the images that the VAE was trained on."""
    std = (vae.bn.running_var + vae.config["batch_norm_eps"]).sqrt()
    mean, std = (value.reshape(1, -1, 1, 1).to(like.device, like.dtype) for value in (vae.bn.running_mean, std))
    return mean, std
