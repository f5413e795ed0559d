"""What a model family needs from its autoencoder: the config, encoding to normalised latents, and decoding.

Shape suffixes: B batch, C h w a latent, H W an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import nn

from smpo_common.errors import UserError
from smpo_models.part_config import complete, subfolder
from smpo_models.weights import load_part, load_weights

ENCODED_PIXELS = 1 << 21
"""Pixels that the VAE encodes at once: two images of 1024 x 1024, or eight of 512 x 512. Its first layers keep three
float32 maps of 128 channels, 1.5 kB per pixel: a whole batch at once would need more memory than the denoiser does."""


class Autoencoder(ABC):
    """A class of autoencoders. Latents are [B, C, h, w] and normalised as the denoiser takes them.

    Attributes:
        vae_class: diffusers' class.
        normalisation: settings of its config that say how latents are normalised.
    """

    vae_class: ClassVar[type[nn.Module]]
    normalisation: ClassVar[tuple[str, ...]]

    @abstractmethod
    def channels(self, config: Mapping[str, Any]) -> int:
        """Return C, the number of latent channels."""

    @abstractmethod
    def factor(self, config: Mapping[str, Any]) -> int:
        """Return how many pixels one latent position covers along each side."""

    @abstractmethod
    def _moments(self, vae: Any, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        """Return mean and standard deviation of the posterior, normalised; see :meth:`posterior`."""

    @abstractmethod
    def _decode(self, vae: Any, latents_BChw: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        """Return the images of normalised latents: [B, 3, H, W], about in [-1, 1]."""

    def check(self, config: Mapping[str, Any], what: str) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse a config with settings that are not supported.

        Args:
            config: of the VAE, with defaults filled in.
            what: starts the error.

        Raises:
            UserError: a setting is not supported.
        """

    def set_tile(self, vae: Any, side: int) -> None:  # noqa: ANN401, ARG002
        """Make a VAE decode in tiles of ``side`` x ``side`` latent positions from now on."""
        vae.enable_tiling()

    def config(self, model: str, vae: str | None, channels: int, what: str) -> dict[str, Any]:
        """Read the config of the VAE to be used.

        Args:
            model: hub id or folder.
            vae: hub id or folder of a VAE in place of the model's own.
            channels: number of latent channels that the model's denoiser takes.
            what: names the model in errors.

        Raises:
            UserError: the VAE's latents are not those that the denoiser was trained on.
        """
        named = f"--vae {vae}" if vae else what
        found = self._read(vae or model, named, inside_model=vae is None)
        self.check(found, named)
        if self.channels(found) != channels:
            raise UserError(
                f"{named}: the VAE has {self.channels(found)} latent channels, the denoiser of {what} takes {channels}"
            )
        if vae is None:
            return found
        own = found
        with suppress(UserError):  # a model that comes without a VAE
            own = self._read(model, what, inside_model=True)
        if self.factor(found) != self.factor(own):
            raise UserError(
                f"--vae {vae} makes one latent of {self.factor(found)} pixels a side, the VAE of {what} of "
                f"{self.factor(own)}; name one that was made for this model"
            )
        for name in self.normalisation:
            if found[name] != own[name]:
                raise UserError(
                    f"--vae {vae} has {name} {found[name]}, the VAE of {what} {own[name]}: "
                    "its latents are not what this denoiser knows; name one that was made for this model"
                )
        return found

    def _read(self, source: str, what: str, *, inside_model: bool) -> dict[str, Any]:
        kind: Any = self.vae_class
        return complete(kind, load_part(kind.load_config, source, what, **subfolder("vae", inside_model)))

    def load(self, model: str, vae: str | None, variant: str | None, what: str) -> nn.Module:
        """Load the VAE in float32; see :meth:`config` for the arguments."""
        kind: Any = self.vae_class
        return load_weights(
            kind.from_pretrained,
            vae or model,
            f"--vae {vae}" if vae else what,
            variant=None if vae else variant,
            torch_dtype=torch.float32,
            **subfolder("vae", vae is None),
        )

    @torch.no_grad()
    def posterior(self, vae: nn.Module, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the posterior, each [B, C, h, w]; encodes a few images at a time.

        Args:
            vae: an instance of ``vae_class``.
            pixels_B3HW: float32 in [-1, 1], on any device.
        """
        images, device = max(1, ENCODED_PIXELS // pixels_B3HW[0, 0].numel()), next(vae.parameters()).device
        parts = [self._moments(vae, part.to(device)) for part in pixels_B3HW.split(images)]
        mean, std = (torch.cat(each) for each in zip(*parts, strict=True))
        return mean, std

    def decode(self, vae: nn.Module, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Return the images of normalised latents: [B, 3, H, W], clamped to [-1, 1].

        The result has a gradient if the latents require one.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents_BChw.requires_grad):
            return self._decode(vae, latents_BChw.to(next(vae.parameters()).device)).clamp(-1, 1)
