"""What both stages need of a text-to-image diffusion model, whatever its family.

Shape suffixes: B batch, C h w a latent, H W an image, L D a text embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from smpo_models.noise_schedule import Process


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is given besides latents and timesteps, one row an image.

    Attributes:
        text_BLD: text embeddings for cross attention.
        added: further tensors by names of the family, each [B, ...].
    """

    text_BLD: torch.Tensor
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: torch.Tensor | slice) -> Conditioning:
        """The given rows (an index or a mask over B)."""
        return Conditioning(self.text_BLD[rows], {name: value[rows] for name, value in self.added.items()})


class Family(ABC):
    """A loaded model. Parts that were not asked for at loading are None.

    Attributes:
        pipelines: names of the diffusers pipeline classes (``_class_name`` of ``model_index.json``) that this is for.
        kind: short name that the manifest records, for example ``sd15``.
        process: noise levels and prediction type.
        denoiser: the model's own denoiser (or the one that replaced it at loading), in evaluation mode.
        text_modules: the frozen text encoders.
        vae: the autoencoder.
        encodes_empty_prompt: whether the empty prompt is what the text encoders make of it, rather than the embedding
            that the model's own pipeline guides with. They differ where that one is zeros (SDXL). Set it after loading.
    """

    pipelines: ClassVar[tuple[str, ...]]
    kind: str
    process: Process
    denoiser: nn.Module | None
    text_modules: tuple[nn.Module, ...]
    vae: nn.Module | None
    encodes_empty_prompt: bool = False

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Carry all parts to another device."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What results depend on besides weights and noise levels, as plain JSON values; all parts must be loaded."""

    @abstractmethod
    def resolution(self) -> int:
        """The side, in pixels, of the square images that the denoiser was made for."""

    @abstractmethod
    def resolution_multiple(self) -> int:
        """Image sides must be multiples of this many pixels."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """C, h, w of the latents of images of this size in pixels."""

    @abstractmethod
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the text encoders make of N prompts; see :meth:`encode_text`."""

    def encode_text(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the text encoders make of B prompts, each distinct one once: tensors [B, ...] by names of the family.

        A prompt's rows do not depend on the others. Longer ones than the encoder takes are cut, as its pipeline does.

        Args:
            prompts: B texts, "" for the unconditional one.
        """
        distinct = list(dict.fromkeys(prompts))
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: value[rows] for name, value in self._encode_distinct(distinct).items()}

    @abstractmethod
    def conditioning(
        self, text: Mapping[str, torch.Tensor], sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]]
    ) -> Conditioning:
        """Encoded prompts, with what else the denoiser is told.

        Args:
            text: of B prompts, as :meth:`encode_text` gives it.
            sizes: B original (height, width) in pixels, before resizing.
            crops: B (top, left) in pixels of the resized image.
        """

    def condition(
        self, prompts: Sequence[str], sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]]
    ) -> Conditioning:
        """Both of the above for B prompts."""
        return self.conditioning(self.encode_text(prompts), sizes, crops)

    @abstractmethod
    def cuts(self, prompt: str) -> bool:
        """Whether a prompt is longer than the encoders take, so that :meth:`encode_text` cuts it."""

    @abstractmethod
    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """One forward of ``denoiser`` (the own one, a tuned one, or one wrapped for training): float32 [B, C, h, w].

        ``x_BChw`` is cast to the denoiser's dtype; ``t_B`` is int64.
        """

    @abstractmethod
    def posterior(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's posterior, each float32 [B, C, h, w], in scaled latents.

        Args:
            pixels_B3HW: float32 in [-1, 1].
        """

    @abstractmethod
    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Images of scaled latents: float32 [B, 3, H, W], clamped to [-1, 1]."""
