"""AutoencoderKLQwenImage: a video's autoencoder, given one frame; each channel has its mean and its scale.

Follows diffusers' ``pipeline_qwenimage_img2img.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn

from smpo_common.errors import UserError
from smpo_models.autoencoders.base import Autoencoder

_RGB = 3


class QwenImageAutoencoder(Autoencoder):
    """See the base class."""

    vae_class: ClassVar[type[nn.Module]] = AutoencoderKLQwenImage
    normalisation: ClassVar[tuple[str, ...]] = ("latents_mean", "latents_std")

    def channels(self, config: Mapping[str, Any]) -> int:
        """See the base class."""
        return int(config["z_dim"])

    def factor(self, config: Mapping[str, Any]) -> int:
        """See the base class."""
        return 2 ** len(config["temperal_downsample"])

    def check(self, config: Mapping[str, Any], what: str) -> None:
        """See the base class."""
        if config["input_channels"] != _RGB:
            raise UserError(
                f"{what}: its VAE reads {config['input_channels']} channels, as of layered images; only RGB is known"
            )

    def _moments(self, vae: Any, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        posterior = vae.encode(pixels_B3HW[:, :, None]).latent_dist
        mean_1C11, std_1C11 = _statistics(vae, pixels_B3HW)
        return (posterior.mean[:, :, 0] - mean_1C11) / std_1C11, posterior.std[:, :, 0] / std_1C11

    def _decode(self, vae: Any, latents_BChw: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        mean_1C11, std_1C11 = _statistics(vae, latents_BChw)
        return vae.decode((latents_BChw * std_1C11 + mean_1C11)[:, :, None]).sample[:, :, 0]

    def set_tile(self, vae: Any, side: int) -> None:  # noqa: ANN401
        """See the base class; tiles overlap by a quarter, as by default."""
        factor = self.factor(vae.config)
        tile, stride = side * factor, max(1, side * 3 // 4) * factor
        vae.enable_tiling(
            tile_sample_min_height=tile,
            tile_sample_min_width=tile,
            tile_sample_stride_height=stride,
            tile_sample_stride_width=stride,
        )


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    """Return the mean and standard deviation of each channel over the images that the denoiser was trained on."""
    mean, std = (like.new_tensor(vae.config[name]).reshape(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, std
