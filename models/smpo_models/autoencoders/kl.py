"""AutoencoderKL: one shift and one scale for all channels, (z - shift_factor) scaling_factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import nn

from smpo_common.errors import UserError
from smpo_models.autoencoders.base import Autoencoder

_BY_CHANNEL = ("latents_mean", "latents_std")


class KLAutoencoder(Autoencoder):
    """See the base class."""

    vae_class: ClassVar[type[nn.Module]] = AutoencoderKL
    normalisation: ClassVar[tuple[str, ...]] = ("scaling_factor", "shift_factor", *_BY_CHANNEL)

    def channels(self, config: Mapping[str, Any]) -> int:
        """See the base class."""
        return int(config["latent_channels"])

    def factor(self, config: Mapping[str, Any]) -> int:
        """See the base class; each block but one halves the sides."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    def check(self, config: Mapping[str, Any], what: str) -> None:
        """See the base class; the pipelines that use it do not scale channel by channel."""
        for name in _BY_CHANNEL:
            if config.get(name) is not None:
                raise UserError(
                    f"{what}: its VAE's config sets {name}; only VAEs that scale all channels alike, "
                    "by scaling_factor and shift_factor, are known"
                )

    def _moments(self, vae: Any, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        posterior, shift, scale = vae.encode(pixels_B3HW).latent_dist, _shift(vae), vae.config["scaling_factor"]
        return (posterior.mean - shift) * scale, posterior.std * scale

    def _decode(self, vae: Any, latents_BChw: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        return vae.decode(latents_BChw / vae.config["scaling_factor"] + _shift(vae)).sample

    def set_tile(self, vae: Any, side: int) -> None:  # noqa: ANN401
        """See the base class."""
        super().set_tile(vae, side)
        vae.tile_latent_min_size = side
        vae.tile_sample_min_size = side * self.factor(vae.config)


def _shift(vae: Any) -> float:  # noqa: ANN401
    return vae.config.get("shift_factor") or 0.0
