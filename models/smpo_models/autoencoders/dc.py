"""AutoencoderDC, the deep autoencoder of Sana (arXiv 2410.10733): no posterior, one scale for all channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC
from torch import nn

from smpo_models.autoencoders.base import Autoencoder


class DCAutoencoder(Autoencoder):
    """See the base class; standard deviations are 0."""

    vae_class: ClassVar[type[nn.Module]] = AutoencoderDC
    normalisation: ClassVar[tuple[str, ...]] = ("scaling_factor",)

    def channels(self, config: Mapping[str, Any]) -> int:
        """See the base class."""
        return int(config["latent_channels"])

    def factor(self, config: Mapping[str, Any]) -> int:
        """See the base class; each block but one halves the sides."""
        return 2 ** (len(config["encoder_block_out_channels"]) - 1)

    def set_tile(self, vae: Any, side: int) -> None:  # noqa: ANN401
        """See the base class; tiles overlap by a quarter, as by default."""
        factor = self.factor(vae.config)
        tile, stride = side * factor, max(1, side * 3 // 4) * factor
        vae.enable_tiling(tile, tile, stride, stride)

    def _moments(self, vae: Any, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        latents_BChw = vae.encode(pixels_B3HW).latent * vae.config["scaling_factor"]
        return latents_BChw, torch.zeros_like(latents_BChw)

    def _decode(self, vae: Any, latents_BChw: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        return vae.decode(latents_BChw / vae.config["scaling_factor"]).sample
