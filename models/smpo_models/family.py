"""The interface to a text-to-image diffusion model that both stages use, whatever its family.

Shape suffixes: B batch, C h w a latent, H W an image, L D a text embedding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from smpo_common.errors import UserError
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_schemas.choices import SamplerChoice
from smpo_schemas.shards.text_rows import TextRow, stack_rows


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is given besides latents and timesteps, one row per image.

    Attributes:
        text_BLD: text embeddings that the denoiser attends to.
        added: further tensors [B, ...], by names that the family chooses.
    """

    text_BLD: torch.Tensor
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: torch.Tensor | slice) -> Conditioning:
        """Return the given rows (an index or a mask over B)."""
        return Conditioning(self.text_BLD[rows], {name: value[rows] for name, value in self.added.items()})


class Family(ABC):
    """A loaded model. Parts that were not asked for at loading are None.

    Latents have the same form everywhere except inside :meth:`denoise`: [B, C, h, w], normalised as the denoiser takes
    them and not packed into tokens.

    Attributes:
        pipelines: names of the diffusers pipeline classes (``_class_name`` in ``model_index.json``) that this is for.
        denoiser_folder: the denoiser's folder in a pipeline, which is also the prefix of its layers in LoRA files.
        lora_targets: ends of the names of the denoiser's layers that a LoRA adapts; none where diffusers has no LoRA
            for it.
        idle_layers: starts of the names of layers whose output the denoiser drops: they have no gradient, for which
            data-parallel training would wait, and are not trained.
        kind: short name that the manifest records, for example ``sd15``.
        latent_factor: pixels per latent position, along one side.
        patch: side of one of the denoiser's tokens, in latent positions; 1 for UNets.
        embedded_guidance: guidance scale that the denoiser is given as an input, if it was distilled to take one; else
            None. Set it after loading.
        samplers: names of the two samplers to choose from. ``model``: the class of the pipeline's own scheduler.
            ``ddim``: the first-order sampler, ``DDIM`` or, for flow models, ``Euler``. If the pipeline's own scheduler
            takes first-order steps, both have the first-order name.
        guidance_calls: how the pipeline asks its denoiser for both predictions of classifier-free guidance: in one call
            with the unconditional rows first or last, or in a second call at the same timestep; ``never`` where it
            makes no unconditional prediction.
        sampler_steps: how many steps the model is usually sampled in.
        usual_guidance: guidance scale that the model is usually sampled at, of classifier-free guidance or the embedded
            one; None where it takes neither.
        noise_schedule: noise levels and prediction type.
        denoiser: the model's own denoiser (or the one that replaced it at loading), in evaluation mode.
        text_modules: the frozen text encoders.
        vae: the autoencoder.
        stores_text: whether the text encoders are so large that each prompt is better encoded once.
        stored_text: reads the embeddings of B distinct prompts, one row per prompt
            (:mod:`smpo_schemas.shards.text_rows`), on any device, in place of the text encoders. Set it after loading.
        encodes_empty_prompt: whether the empty prompt is encoded like any other, rather than as the unconditional
            embedding that the model's own pipeline guides with, which may differ (zeros in SDXL). Set it after loading.
    """

    pipelines: ClassVar[tuple[str, ...]]
    denoiser_folder: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    idle_layers: tuple[str, ...] = ()
    kind: str
    latent_factor: int
    patch: int = 1
    embedded_guidance: float | None = None
    samplers: Mapping[SamplerChoice, str]
    guidance_calls: ClassVar[Literal["unconditional first", "conditional first", "separate", "never"]]
    sampler_steps: int
    usual_guidance: float | None
    noise_schedule: NoiseSchedule
    denoiser: nn.Module | None
    text_modules: tuple[nn.Module, ...]
    vae: nn.Module | None
    stores_text: ClassVar[bool] = False
    stored_text: Callable[[Sequence[str]], Sequence[TextRow]] | None = None
    encodes_empty_prompt: bool = False

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move all parts to another device."""

    @abstractmethod
    def _on_device(self, value: torch.Tensor) -> torch.Tensor:
        """Move a tensor to the device of the parts."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return all that results depend on besides weights and noise levels, as plain JSON values.

        Denoiser and VAE must be loaded. Without text encoders, :meth:`text_settings` are left out.
        """

    @abstractmethod
    def text_settings(self) -> dict[str, Any]:
        """Return all that encoded prompts depend on besides weights, as plain JSON values.

        The text encoders must be loaded.
        """

    @abstractmethod
    def resolution(self) -> int:
        """Return the side, in pixels, of the square images that the denoiser was made for."""

    @abstractmethod
    def resolution_multiple(self) -> int:
        """Return the number of pixels of which image sides must be multiples."""

    def resolution_limits(self) -> tuple[int, int | None]:
        """Return the smallest and the largest side in pixels that the denoiser can be used at; None: no limit."""
        return self.resolution_multiple(), None

    def check_resolution(self, side: int, what: str) -> None:
        """Check that the denoiser can be used for square images of ``side`` pixels.

        Args:
            side: as ``--resolution`` names it.
            what: names the model in errors.

        Raises:
            UserError: the side is too small, too large, or no multiple of what the model needs.
        """
        if side % self.resolution_multiple():
            raise UserError(f"--resolution {side}: {what} needs a multiple of {self.resolution_multiple()}")
        smallest, largest = self.resolution_limits()
        if side < smallest:
            raise UserError(
                f"--resolution {side}: {what} was made for images of {self.resolution()} pixels, and makes broken ones "
                f"below {smallest}"
            )
        if largest is not None and side > largest:
            raise UserError(
                f"--resolution {side}: {what} knows no positions beyond {largest} pixels; take a smaller one"
            )

    def check_lora(self, rank: int, what: str) -> None:
        """Check that the denoiser can be trained by an adapter.

        Args:
            rank: as ``--lora-rank`` names it.
            what: names the model in errors.

        Raises:
            UserError: diffusers has no LoRA for the denoiser.
        """
        if not self.lora_targets:
            raise UserError(
                f"--lora-rank {rank}: diffusers has no LoRA for the denoiser of {what} ({self.kind}); leave it out to "
                "train all weights"
            )

    @abstractmethod
    def empty_denoiser(self) -> nn.Module:
        """Return a denoiser of the model's own architecture on the meta device, without weights."""

    def sampling_options(self, guidance_scale: float | None, images: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the arguments that make the model's pipeline guide by this scale, and read prompts as we do.

        Args:
            guidance_scale: of classifier-free guidance, 1 is none; or the scale that the denoiser is given as an input;
                None for models that take none.
            images: number of images in the call; some pipelines want an unconditional prompt for each.
        """
        return {} if guidance_scale is None else {"guidance_scale": guidance_scale}

    def to_pipeline(self, x_BChw: torch.Tensor) -> torch.Tensor:
        """Convert latents [B, C, h, w] to the form that the model's pipeline takes."""
        return x_BChw

    def from_pipeline(self, latents: torch.Tensor, height: int, width: int, vae: nn.Module) -> torch.Tensor:  # noqa: ARG002
        """Convert the latents that the model's pipeline returns to [B, C, h, w], normalised.

        Args:
            latents: the pipeline's output for ``output_type="latent"``.
            height: h.
            width: w.
            vae: of the pipeline, where its statistics normalise latents.
        """
        return latents

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return C, h, w of the latents of images of this size in pixels."""

    def num_tokens(self, height: int, width: int) -> int:
        """Return the number of image tokens of an image of this size in pixels, as the sampler counts them."""
        _, *sides = self.latent_shape(height, width)
        return math.prod(side // self.patch for side in sides)

    @abstractmethod
    def _encode_distinct(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode N prompts; see :meth:`encode_text`."""

    def encode_text(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode B prompts, each distinct one once, or look them up: tensors [B, ...] by names that the family chooses.

        ``text`` is [B, L, D]. If its length depends on the prompt, shorter rows are padded with zeros to the longest,
        and ``mask``, bool [B, L], is True where there is text. Apart from that padding, a prompt's rows do not depend
        on the other prompts. Prompts that are longer than an encoder takes are cut, as in the model's pipeline.

        Args:
            prompts: B texts, "" for the unconditional one.
        """
        distinct = list(dict.fromkeys(prompts))
        rows = [distinct.index(prompt) for prompt in prompts]
        encoded = stack_rows(self.stored_text(distinct)) if self.stored_text else self._encode_distinct(distinct)
        return {name: self._on_device(value)[rows] for name, value in encoded.items()}

    @abstractmethod
    def longest_text(self, prompts: int) -> dict[str, torch.Tensor]:
        """Return zeros with the names and shapes of encoded prompts of the greatest length.

        Only configs are needed. There is no padding, and so no ``mask``.
        """

    @abstractmethod
    def conditioning(
        self, text: Mapping[str, torch.Tensor], sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]]
    ) -> Conditioning:
        """Join encoded prompts with the other inputs of the denoiser.

        Args:
            text: of B prompts, as :meth:`encode_text` gives it.
            sizes: B original (height, width) in pixels, before resizing.
            crops: B (top, left) in pixels of the resized image.
        """

    def condition(
        self, prompts: Sequence[str], sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]]
    ) -> Conditioning:
        """Encode B prompts and join them with the other inputs."""
        return self.conditioning(self.encode_text(prompts), sizes, crops)

    @abstractmethod
    def cuts(self, prompt: str) -> bool:
        """Return whether a prompt is longer than the encoders take, so that :meth:`encode_text` cuts it."""

    @abstractmethod
    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Return a denoiser's output, float32 [B, C, h, w].

        The family packs latents, maps the time to what its denoiser takes, and gives the output the sign that the
        noise schedule expects.

        Args:
            denoiser: the model's own, a tuned one, or one wrapped for training; ``x_BChw`` is cast to its dtype.
            x_BChw: noisy latents.
            t_B: timesteps, in the noise schedule's ``timestep_dtype``.
            conditioning: of the B images.
        """

    @abstractmethod
    def posterior(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the VAE's posterior, each float32 [B, C, h, w], in normalised latents.

        Args:
            pixels_B3HW: float32 in [-1, 1].
        """

    @abstractmethod
    def decode_in_tiles(self, vae: nn.Module, side: int) -> None:
        """Make a VAE of the model's class decode in tiles of ``side`` x ``side`` latent positions."""

    @abstractmethod
    def decode(self, latents_BChw: torch.Tensor, vae: nn.Module | None = None) -> torch.Tensor:
        """Return the images of normalised latents: float32 [B, 3, H, W], clamped to [-1, 1].

        Args:
            latents_BChw: on any device.
            vae: in place of the loaded one, for example that of a pipeline.
        """
