"""What the families with a UNet, a KL autoencoder and CLIP text encoders share; they differ in the conditioning.

Shape suffixes: B batch, C h w a latent, H W an image.
"""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.family import Conditioning, Family
from smpo_models.fingerprint import settings_of
from smpo_models.loading import denoiser_folder
from smpo_models.noise_schedule import VariancePreserving, check_scheduler
from smpo_models.weights import load_part, load_tokenizer, load_weights

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
        variant: str | None,
        device: torch.device,
    ) -> None:
        self._model, self._what, self._variant, self._device = model, f"--model {model}", variant, device
        check_scheduler(load_part(DDIMScheduler.load_config, model, self._what, subfolder="scheduler"), self._what)
        # clip_sample defaults to True and survives from schedulers that lack it; latents must not be clipped.
        scheduler = load_part(
            DDIMScheduler.from_pretrained, model, self._what, subfolder="scheduler", clip_sample=False
        )
        self.process = VariancePreserving(scheduler)
        self.denoiser, self.vae, self.text_modules = None, None, ()
        config = load_unet_config(model, self._what)
        self.kind = self._kind(config)
        vae_config = self._vae_config(vae, config)
        self.latent_factor = _factor(vae_config)
        self._channels = config["in_channels"]
        self._sample_size = config["sample_size"]
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
                variant=None if vae else variant,
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
        source, what = (vae, f"--vae {vae}") if vae else (self._model, self._what)
        found = _complete(
            AutoencoderKL, load_part(AutoencoderKL.load_config, source, what, **_subfolder("vae", vae is None))
        )
        _check_latents(found, what)
        if found["latent_channels"] != unet_config["in_channels"]:
            raise UserError(
                f"{what}: the VAE has {found['latent_channels']} latent channels, "
                f"the denoiser of {self._what} takes {unet_config['in_channels']}"
            )
        if vae is None:
            return found
        own = found
        with suppress(UserError):  # a model that comes without a VAE
            own = load_part(AutoencoderKL.load_config, self._model, self._what, subfolder="vae")
        own = _complete(AutoencoderKL, own)
        if _factor(found) != _factor(own):
            raise UserError(
                f"--vae {vae} makes one latent of {_factor(found)} pixels a side, the VAE of {self._what} of "
                f"{_factor(own)}; name one that was made for this model"
            )
        for name in ("scaling_factor", "shift_factor", *_NORMALISED):
            if found[name] != own[name]:
                raise UserError(
                    f"--vae {vae} has {name} {found[name]}, the VAE of {self._what} {own[name]}: "
                    "its latents are not what this denoiser knows; name one that was made for this model"
                )
        return found

    def _load_denoiser(self, folder: Path | None, config: dict[str, Any]) -> nn.Module:
        source, what = (str(denoiser_folder(folder)), f"denoiser {folder}") if folder else (self._model, self._what)
        unet = load_weights(
            UNet2DConditionModel.from_pretrained,
            source,
            what,
            variant=self._variant,
            torch_dtype=torch.float32,
            **_subfolder("unet", folder is None),
        )
        for name in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type"):
            if unet.config[name] != config[name]:
                raise UserError(f"{what} has {name} {unet.config[name]}, the one of {self._what} {config[name]}")
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
        return native_resolution(self._sample_size, self.latent_factor, self._what)

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


def _check_latents(vae_config: Mapping[str, Any], what: str) -> None:
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


def load_unet_config(model: str, what: str) -> dict[str, Any]:
    """Read the config of a model's UNet, with the library's default of each setting that the file leaves out.

    Args:
        model: hub id, or a folder with a sub-folder ``unet``.
        what: starts the error.

    Raises:
        UserError: there is none, or it takes more than noisy latents (of an inpainting or editing model).
    """
    config = _complete(UNet2DConditionModel, load_part(UNet2DConditionModel.load_config, model, what, subfolder="unet"))
    if config["in_channels"] != config["out_channels"]:
        raise UserError(
            f"{what}: its UNet takes {config['in_channels']} channels and gives {config['out_channels']}, as models "
            "for inpainting or editing do; only text-to-image models are known"
        )
    return config


def native_resolution(sample_size: int | Sequence[int] | None, latent_factor: int, what: str) -> int:
    """Side, in pixels, of the square images that a UNet was made for.

    Args:
        sample_size: of its config: sides of its latents.
        latent_factor: pixels a latent position, along one side.
        what: starts the error.

    Raises:
        UserError: the config names no square.
    """
    height, width = sample_size if isinstance(sample_size, Sequence) else (sample_size, sample_size)
    if height is None or height != width:
        raise UserError(
            f"{what}: sample_size in its unet/config.json is {sample_size}, which names no square; "
            "name the side of its images with --resolution"
        )
    return height * latent_factor


def latent_factor(model: str, what: str) -> int:
    """Pixels a latent position of a model's VAE, along one side.

    Raises:
        UserError: the model has none.
    """
    return _factor(_complete(AutoencoderKL, load_part(AutoencoderKL.load_config, model, what, subfolder="vae")))


def _complete(kind: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the library's defaults for what it leaves out, as configs that others wrote do."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty} | dict(config)


def _factor(vae_config: Mapping[str, Any]) -> int:
    """Pixels a latent position, along one side."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def _subfolder(name: str, inside_model: bool) -> dict[str, str]:
    return {"subfolder": name} if inside_model else {}
