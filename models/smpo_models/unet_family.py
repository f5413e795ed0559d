"""What the families with a UNet, a KL autoencoder and CLIP text encoders share; they differ in the conditioning.

Shape suffixes: B batch, C h w a latent, H W an image.
"""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from smpo_models.family import Conditioning, Family
from smpo_models.fingerprint import settings_of
from smpo_models.loading import denoiser_folder
from smpo_models.process import VariancePreserving, check_scheduler
from smpo_models.weights import load_part, load_tokenizer, load_weights
from smpo_schemas.errors import UserError
from smpo_schemas.files import sha256_json

ENCODED_PIXELS = 1 << 21
"""Pixels that the VAE encodes at once, two images of 1024 or eight of 512. Its first layers keep three float32 maps of
128 channels, 1.5 kB a pixel: all images of a batch at once would need more memory than the denoiser does."""


_TEXT_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id")
"""What a CLIP text encoder computes by, and its weights' shapes do not tell."""

_NORMALISED = ("latents_mean", "latents_std")
"""Of VAEs whose latents are scaled channel by channel."""


class UNetFamily(Family):
    """See :class:`smpo_models.family.Family`; a subclass says how prompts, sizes and crops become conditioning.

    Attributes:
        latent_factor: pixels a latent position, along one side.
    """

    latent_factor: int
    _tokenizers: Sequence[CLIPTokenizer]

    def __init__(
        self,
        model: str,
        parts: Collection[str],
        *,
        denoiser: Path | None,
        vae: str | None,
        device: torch.device,
    ) -> None:
        self._model, self._what, self._device = model, f"--model {model}", device
        check_scheduler(load_part(DDIMScheduler.load_config, model, self._what, subfolder="scheduler"), self._what)
        # clip_sample defaults to True and survives from schedulers that lack it; latents must not be clipped.
        scheduler = load_part(
            DDIMScheduler.from_pretrained, model, self._what, subfolder="scheduler", clip_sample=False
        )
        self.process = VariancePreserving(scheduler)
        self.denoiser, self.vae, self.text_modules = None, None, ()
        config = load_part(UNet2DConditionModel.load_config, model, self._what, subfolder="unet")
        self.kind = self._kind(config)
        vae_config = self._vae_config(vae, config)
        self.latent_factor = _factor(vae_config)
        self._channels = config["in_channels"]
        self._resolution = config["sample_size"] * self.latent_factor
        self._multiple = self.latent_factor * 2 ** (len(config["block_out_channels"]) - 1)
        if "denoiser" in parts:
            self.denoiser = self._load_denoiser(denoiser, config)
        if "text" in parts:
            self.text_modules = tuple(module.requires_grad_(False).eval().to(device) for module in self._load_text())
        if "vae" in parts:
            autoencoder = load_weights(
                AutoencoderKL.from_pretrained,
                vae or model,
                f"--vae {vae}" if vae else self._what,
                torch_dtype=torch.float32,
                **_subfolder("vae", vae is None),
            )
            self.vae = autoencoder.requires_grad_(False).eval().to(device)

    @abstractmethod
    def _kind(self, unet_config: dict[str, Any]) -> str:
        """``kind`` by the model's own UNet config."""

    @abstractmethod
    def _load_text(self) -> Sequence[nn.Module]:
        """Load ``_tokenizers`` and text encoders; returns the encoders."""

    def _vae_config(self, vae: str | None, unet_config: dict[str, Any]) -> dict[str, Any]:
        """Config of the VAE to be used.

        Raises:
            UserError: it is one of another latent space.
        """
        if vae is None:
            own = load_part(AutoencoderKL.load_config, self._model, self._what, subfolder="vae")
            _check_latents(own, self._what)
            return own
        found = load_part(AutoencoderKL.load_config, vae, f"--vae {vae}")
        _check_latents(found, f"--vae {vae}")
        if _setting(found, "latent_channels") != unet_config["in_channels"]:
            raise UserError(
                f"--vae {vae} has {_setting(found, 'latent_channels')} latent channels, "
                f"the denoiser of {self._what} takes {unet_config['in_channels']}"
            )
        own = found
        with suppress(UserError):  # a model that comes without a VAE
            own = load_part(AutoencoderKL.load_config, self._model, self._what, subfolder="vae")
        if _factor(found) != _factor(own):
            raise UserError(
                f"--vae {vae} makes one latent of {_factor(found)} pixels a side, the VAE of {self._what} of "
                f"{_factor(own)}; name one that was made for this model"
            )
        for name in ("scaling_factor", "shift_factor", *_NORMALISED):
            if _setting(found, name) != _setting(own, name):
                raise UserError(
                    f"--vae {vae} has {name} {_setting(found, name)}, the VAE of {self._what} {_setting(own, name)}: "
                    "its latents are not what this denoiser knows; name one that was made for this model"
                )
        return found

    def _load_denoiser(self, folder: Path | None, config: dict[str, Any]) -> nn.Module:
        source, what = (str(denoiser_folder(folder)), f"denoiser {folder}") if folder else (self._model, self._what)
        unet = load_weights(
            UNet2DConditionModel.from_pretrained,
            source,
            what,
            torch_dtype=torch.float32,
            **_subfolder("unet", folder is None),
        )
        for name in ("in_channels", "cross_attention_dim", "addition_embed_type"):
            if unet.config[name] != config.get(name):
                raise UserError(f"{what} has {name} {unet.config[name]}, the one of {self._what} {config.get(name)}")
        return unet.requires_grad_(False).eval().to(self._device)

    def settings(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "denoiser": settings_of(self.denoiser),
            "vae": settings_of(self.vae),
            "text": [{name: getattr(text.config, name) for name in _TEXT_SETTINGS} for text in self.text_modules],
            "tokenizers": [_tokenizer_settings(tokenizer) for tokenizer in self._tokenizers],
        }

    def resolution(self) -> int:
        """See the base class."""
        return self._resolution

    def resolution_multiple(self) -> int:
        """See the base class."""
        return self._multiple

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See the base class."""
        return self._channels, height // self.latent_factor, width // self.latent_factor

    def _load_tokenizer(self, name: str) -> CLIPTokenizer:
        """The tokenizer in the model's subfolder ``name``."""
        return load_tokenizer(CLIPTokenizer.from_pretrained, self._model, self._what, subfolder=name)

    def cuts(self, prompt: str) -> bool:
        """See the base class."""
        return any(
            len(tokenizer.encode(prompt, truncation=True, max_length=limit + 1)) > limit
            for tokenizer in self._tokenizers
            for limit in (tokenizer.model_max_length,)
        )

    def _tokens(self, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids [N, L], cut and padded to the encoder's length, as the pipelines do."""
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self._device)

    def denoise(
        self, denoiser: nn.Module, x_BChw: torch.Tensor, t_B: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """See the base class."""
        dtype = next(denoiser.parameters()).dtype
        text, added = conditioning.text_BLD.to(dtype), self._added(x_BChw, conditioning)
        return denoiser(x_BChw.to(dtype), t_B, encoder_hidden_states=text, added_cond_kwargs=added).sample.float()

    def _added(self, x_BChw: torch.Tensor, conditioning: Conditioning) -> dict[str, torch.Tensor] | None:  # noqa: ARG002
        """What the UNet takes besides text, by its own names; None where it takes nothing."""
        return None

    @torch.no_grad()
    def posterior(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        vae = self._require_vae()
        images = max(1, ENCODED_PIXELS // pixels_B3HW[0, 0].numel())
        parts = [vae.encode(part.to(self._device)).latent_dist for part in pixels_B3HW.split(images)]
        mean, std = (torch.cat(each) for each in zip(*((part.mean, part.std) for part in parts), strict=True))
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
        return (mean - shift) * scale, std * scale

    @torch.no_grad()
    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        vae = self._require_vae()
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
        return vae.decode(latents_BChw.to(self._device) / scale + shift).sample.clamp(-1, 1)

    def to(self, device: torch.device | str) -> None:
        """See the base class."""
        self._device = torch.device(device)
        for module in (self.denoiser, self.vae, *self.text_modules):
            if module is not None:
                module.to(self._device)

    def _require_vae(self) -> AutoencoderKL:
        if self.vae is None:
            raise RuntimeError("this model was loaded without its VAE")
        return self.vae


def _check_latents(vae_config: dict[str, Any], what: str) -> None:
    """Whether latents are scaled by one number.

    Raises:
        UserError: they are not.
    """
    for name in _NORMALISED:
        if vae_config.get(name) is not None:
            raise UserError(
                f"{what}: its VAE's config sets {name}; only VAEs that scale all channels alike, "
                "by scaling_factor and shift_factor, are known"
            )


def _tokenizer_settings(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # How the last prompts were cut and padded.
    del backend["truncation"], backend["padding"]
    return {"tokens": sha256_json(backend), "pad": tokenizer.pad_token_id, "length": tokenizer.model_max_length}


def _factor(vae_config: dict[str, Any]) -> int:
    """Pixels a latent position, along one side."""
    return 2 ** (len(_setting(vae_config, "block_out_channels")) - 1)


def _setting(vae_config: dict[str, Any], name: str) -> Any:  # noqa: ANN401
    """Of a VAE, with the library's default: older configs leave some out."""
    return vae_config.get(name, inspect.signature(AutoencoderKL.__init__).parameters[name].default)


def _subfolder(name: str, inside_model: bool) -> dict[str, str]:
    return {"subfolder": name} if inside_model else {}
