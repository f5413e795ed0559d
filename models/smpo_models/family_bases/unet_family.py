"""What the families with a UNet and CLIP text encoders share; they differ in the conditioning.

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from smpo_common.errors import UserError
from smpo_models.arithmetic import input_dtype
from smpo_models.family import Conditioning
from smpo_models.family_bases.diffusers_family import DiffusersFamily
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_models.noise_schedules.variance_preserving import load_variance_preserving
from smpo_models.part_config import complete
from smpo_models.weights import load_part
from smpo_schemas.shards.text_rows import TEXT


class UNetFamily(DiffusersFamily):
    """See :class:`smpo_models.family.Family`; a subclass says how prompts, sizes and crops become conditioning."""

    denoiser_class: ClassVar[type[nn.Module]] = UNet2DConditionModel
    denoiser_folder: ClassVar[str] = "unet"
    guidance_calls = "unconditional first"
    sampler_steps: int = 50
    usual_guidance: float | None = 7.5
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    _same_config: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "out_channels",
        "cross_attention_dim",
        "addition_embed_type",
    )

    def _denoiser_config(self) -> dict[str, Any]:
        return load_unet_config(self._model, self._what)

    def _load_schedule(self) -> NoiseSchedule:
        return load_variance_preserving(self._model, self._what)

    def longest_text(self, prompts: int) -> dict[str, torch.Tensor]:
        """See the base class."""
        tokens = self._encoder_config(CLIPTextModel, "text_encoder").max_position_embeddings
        return {TEXT: torch.zeros(prompts, tokens, int(self._config["cross_attention_dim"]))}

    def resolution_multiple(self) -> int:
        """See the base class; each block but one halves the sides."""
        return self.latent_factor * 2 ** (len(self._config["block_out_channels"]) - 1)

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype = input_dtype(denoiser, x_BChw.device)
        text, added = conditioning.text_BLD.to(dtype), self._added(x_BChw, conditioning)
        return denoiser(x_BChw.to(dtype), t_B, encoder_hidden_states=text, added_cond_kwargs=added).sample.float()

    def _added(self, x_BChw: torch.Tensor, conditioning: Conditioning) -> Mapping[str, torch.Tensor] | None:  # noqa: ARG002
        """Return what the UNet takes besides text, by its own names; None where it takes nothing."""
        return None


def load_unet_config(model: str, what: str) -> dict[str, Any]:
    """Read the config of a model's UNet, with the library's default of each setting that the file leaves out.

    Args:
        model: hub id, or a folder with a sub-folder ``unet``.
        what: starts the error.

    Raises:
        UserError: there is no UNet, or it takes more than noisy latents (that of an inpainting or editing model).
    """
    config = complete(UNet2DConditionModel, load_part(UNet2DConditionModel.load_config, model, what, subfolder="unet"))
    if config["in_channels"] != config["out_channels"]:
        raise UserError(
            f"{what}: its UNet takes {config['in_channels']} channels and gives {config['out_channels']}, as models "
            "for inpainting or editing do; only text-to-image models are known"
        )
    return config
