"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, a four-channel VAE."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from smpo_models.family import Conditioning, Family
from smpo_models.loading import denoiser_folder, load_part, load_weights
from smpo_models.process import VariancePreserving

_OPENCLIP_H_WIDTH = 1024
"""Width of SD 2.x's text encoder; SD 1.x's is 768."""


class StableDiffusion(Family):
    """See :class:`smpo_models.family.Family`."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)

    def __init__(
        self,
        model: str,
        parts: Collection[str],
        *,
        denoiser: Path | None,
        vae: str | None,
        device: torch.device,
    ) -> None:
        what = f"--model {model}"
        # clip_sample defaults to True and survives from schedulers that lack it; latents must not be clipped.
        scheduler = load_part(DDIMScheduler.from_pretrained, model, what, subfolder="scheduler", clip_sample=False)
        self.process = VariancePreserving(scheduler)
        self.denoiser, self.vae, self.text_modules = None, None, ()
        config = load_part(UNet2DConditionModel.load_config, model, what, subfolder="unet")
        self.kind = "sd2" if config["cross_attention_dim"] == _OPENCLIP_H_WIDTH else "sd15"
        vae_config = load_part(
            AutoencoderKL.load_config, vae or model, f"--vae {vae}" if vae else what, **_subfolder("vae", vae is None)
        )
        self._factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
        self._resolution = config["sample_size"] * self._factor
        self._multiple = self._factor * 2 ** (len(config["block_out_channels"]) - 1)
        if "denoiser" in parts:
            source, described = (str(denoiser_folder(denoiser)), f"denoiser {denoiser}") if denoiser else (model, what)
            unet = load_weights(
                UNet2DConditionModel.from_pretrained,
                source,
                described,
                torch_dtype=torch.float32,
                **_subfolder("unet", denoiser is None),
            )
            self.denoiser = unet.requires_grad_(False).eval().to(device)
        if "text" in parts:
            self._tokenizer = load_part(CLIPTokenizer.from_pretrained, model, what, subfolder="tokenizer")
            text = load_weights(
                CLIPTextModel.from_pretrained, model, what, subfolder="text_encoder", dtype=torch.float32
            )
            self.text_modules = (text.requires_grad_(False).eval().to(device),)
        if "vae" in parts:
            autoencoder = load_weights(
                AutoencoderKL.from_pretrained,
                vae or model,
                f"--vae {vae}" if vae else what,
                torch_dtype=torch.float32,
                **_subfolder("vae", vae is None),
            )
            self.vae = autoencoder.requires_grad_(False).eval().to(device)
        self._device = device

    def resolution(self) -> int:
        """See the base class."""
        return self._resolution

    def resolution_multiple(self) -> int:
        """See the base class."""
        return self._multiple

    @torch.no_grad()
    def condition(
        self,
        prompts: Sequence[str],
        sizes: Sequence[tuple[int, int]],  # noqa: ARG002
        crops: Sequence[tuple[int, int]],  # noqa: ARG002
    ) -> Conditioning:
        """See the base class; this family takes no size and no crop."""
        distinct = list(dict.fromkeys(prompts))
        tokens = self._tokenizer(
            distinct,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        text = self.text_modules[0](tokens.input_ids.to(self._device))[0]
        rows = [distinct.index(prompt) for prompt in prompts]
        return Conditioning(text[rows])

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        parameter = next(denoiser.parameters())
        x = x_BChw.to(parameter.dtype)
        return denoiser(x, t_B, encoder_hidden_states=conditioning.text_BLD.to(parameter.dtype)).sample.float()

    @torch.no_grad()
    def posterior(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        vae = self._require_vae()
        posterior = vae.encode(pixels_B3HW.to(self._device)).latent_dist
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
        return (posterior.mean - shift) * scale, posterior.std * scale

    @torch.no_grad()
    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        vae = self._require_vae()
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
        return vae.decode(latents_BChw.to(self._device) / scale + shift).sample.clamp(-1, 1)

    def _require_vae(self) -> AutoencoderKL:
        if self.vae is None:
            raise RuntimeError("this model was loaded without its VAE")
        return self.vae


def _subfolder(name: str, inside_model: bool) -> dict[str, str]:
    return {"subfolder": name} if inside_model else {}
