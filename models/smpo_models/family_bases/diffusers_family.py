"""Base class of the families whose parts lie in the folders of a diffusers pipeline.

Shape suffixes: B batch, C h w a latent, H W an image.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.autoencoders.base import Autoencoder
from smpo_models.autoencoders.kl import KLAutoencoder
from smpo_models.family import Family
from smpo_models.fingerprint import settings_of
from smpo_models.loading import denoiser_folder
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_models.noise_schedules.samplers import own_sampler
from smpo_models.part_config import complete, native_resolution, subfolder
from smpo_models.weights import holds, load_part, load_tokenizer, load_weights

_TEXT_SETTINGS = (
    "hidden_act",
    "layer_norm_eps",
    "num_attention_heads",
    "eos_token_id",
    # T5's.
    "feed_forward_proj",
    "layer_norm_epsilon",
    "d_kv",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    # Language models'.
    "rms_norm_eps",
    "head_dim",
    "num_key_value_heads",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "hidden_activation",
)
"""Config settings that a text encoder's output depends on and that the shapes of its weights do not show."""


class DiffusersFamily(Family):
    """See :class:`smpo_models.family.Family`; subclasses say which classes the parts have, and how they are used.

    Attributes:
        denoiser_class: diffusers' class of the denoiser.
        autoencoder: for VAEs of the family's class.
    """

    denoiser_class: ClassVar[type[nn.Module]]
    autoencoder: ClassVar[Autoencoder] = KLAutoencoder()
    _same_config: ClassVar[tuple[str, ...]]
    """Settings that another denoiser in place of the model's own must share with it."""

    _tokenizers: Sequence[PreTrainedTokenizerFast]

    def __init__(
        self,
        model: str,
        parts: Collection[str],
        *,
        denoiser: Path | None,
        vae: str | None,
        variant: str | None,
        device: torch.device,
        denoiser_dtype: torch.dtype,
        what: str,
    ) -> None:
        self._model, self._what, self._variant = model, what, variant
        # On the meta device only the parts are empty: inputs that are made here have values, and are on the CPU.
        self._is_empty = device.type == "meta"
        self._device = torch.device("cpu") if self._is_empty else device
        self.denoiser, self.vae, self.text_modules = None, None, ()
        self._config = config = self._denoiser_config()
        self._channels = self._latent_channels(config)
        self._sample_size = self._latent_side(self._replacing_config(denoiser) if denoiser else config)
        self.kind = self._kind(config)
        self.noise_schedule = self._load_schedule()
        first_order = self.noise_schedule.first_order
        self.samplers = {"model": own_sampler(model, what, first_order), "ddim": first_order}
        self.latent_factor = self.autoencoder.factor(self.autoencoder.config(model, vae, self._channels, self._what))
        if "denoiser" in parts:
            self.denoiser = self._load_denoiser(denoiser, denoiser_dtype)
        if "text" in parts:
            self.text_modules = tuple(module.requires_grad_(False).eval().to(device) for module in self._load_text())
        if "vae" in parts:
            loaded = self._empty_vae(vae) if self._is_empty else self.autoencoder.load(model, vae, variant, self._what)
            self.vae = loaded.requires_grad_(False).eval().to(device)

    @abstractmethod
    def _kind(self, config: Mapping[str, Any]) -> str:
        """Return the attribute ``kind``, given the config of the model's own denoiser."""

    @abstractmethod
    def _load_schedule(self) -> NoiseSchedule:
        """Load the noise schedule from the model's own scheduler config."""

    @abstractmethod
    def _load_text(self) -> Sequence[nn.Module]:
        """Load the tokenizers into ``_tokenizers``, and return the text encoders."""

    def _latent_channels(self, config: Mapping[str, Any]) -> int:
        """Return the number of channels of latents that are not packed."""
        return int(config["in_channels"])

    def _latent_side(self, config: Mapping[str, Any]) -> int | Sequence[int] | None:
        """Return the side of the latents that the denoiser was made for, or both sides."""
        return config["sample_size"]

    def _denoiser_config(self) -> dict[str, Any]:
        """Read the config of the model's own denoiser, with the library's defaults for what it leaves out."""
        kind = cast("Any", self.denoiser_class)
        return complete(kind, load_part(kind.load_config, self._model, self._what, subfolder=self.denoiser_folder))

    def _replacing_config(self, folder: Path) -> dict[str, Any]:
        """Read the config of a denoiser in place of the model's own.

        Raises:
            UserError: it does not fit the model.
        """
        kind, what = cast("Any", self.denoiser_class), f"denoiser {folder}"
        config = complete(kind, load_part(kind.load_config, str(denoiser_folder(folder, self.denoiser_folder)), what))
        for setting in self._same_config:
            if config[setting] != self._config[setting]:
                raise UserError(
                    f"{what} has {setting} {config[setting]}, the one of {self._what} {self._config[setting]}"
                )
        return config

    def empty_denoiser(self) -> nn.Module:
        """See the base class."""
        with torch.device("meta"):
            return cast("Any", self.denoiser_class).from_config(self._config)

    def _empty_vae(self, vae: str | None) -> nn.Module:
        config = self.autoencoder.config(self._model, vae, self._channels, self._what)
        with torch.device("meta"):
            return cast("Any", self.autoencoder.vae_class).from_config(config)

    def _load_denoiser(self, folder: Path | None, dtype: torch.dtype) -> nn.Module:
        if self._is_empty:
            return self.empty_denoiser().requires_grad_(False).eval()
        name, kind = self.denoiser_folder, cast("Any", self.denoiser_class)
        source = str(denoiser_folder(folder, name)) if folder else self._model
        what = f"denoiser {folder}" if folder else self._what
        place = subfolder(name, folder is None)
        if dtype != torch.float32 and not holds(dtype, source, what, variant=self._variant, **place):
            dtype = torch.float32
        loaded = load_weights(kind.from_pretrained, source, what, variant=self._variant, torch_dtype=dtype, **place)
        return loaded.requires_grad_(False).eval().to(self._device)

    def _load_encoder(
        self,
        kind: Any,  # noqa: ANN401  (transformers' from_pretrained)
        folder: str,
        dtype: torch.dtype | str = torch.float32,
    ) -> nn.Module:
        """Load a text encoder from the model's folder of this name; ``auto`` keeps the dtype of its files.

        Language models are published in bfloat16, and would need twice the memory in float32.
        """
        if self._is_empty:
            config = self._encoder_config(kind, folder)
            with torch.device("meta"):
                return kind(config).to(config.dtype if dtype == "auto" else dtype)
        return load_weights(
            kind.from_pretrained,
            self._model,
            self._what,
            variant=self._variant,
            subfolder=folder,
            dtype=dtype,
        )

    def _encoder_config(self, kind: Any, folder: str) -> Any:  # noqa: ANN401  (transformers' own)
        """Read the config of a text encoder."""
        return load_part(kind.config_class.from_pretrained, self._model, self._what, subfolder=folder)

    def _load_tokenizer(self, kind: Any, folder: str) -> Any:  # noqa: ANN401
        """Load a tokenizer from the model's folder of this name."""
        if self._is_empty:
            return None
        return load_tokenizer(kind.from_pretrained, self._model, self._what, subfolder=folder)

    def settings(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "denoiser": settings_of(self.denoiser),
            "vae": settings_of(self.vae),
            **(self.text_settings() if self.text_modules else {}),
        }

    def text_settings(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "text": [_encoder_settings(text) for text in self.text_modules],
            "tokenizers": [_tokenizer_settings(tokenizer) for tokenizer in self._tokenizers],
        }

    def resolution(self) -> int:
        """See the base class."""
        return native_resolution(self._sample_size, self.latent_factor, self._what, self.denoiser_folder)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See the base class."""
        return self._channels, height // self.latent_factor, width // self.latent_factor

    def _text_limits(self) -> Sequence[int]:
        """Return the maximum number of tokens of each tokenizer."""
        return [tokenizer.model_max_length for tokenizer in self._tokenizers]

    def cuts(self, prompt: str) -> bool:
        """See the base class."""
        return any(
            len(tokenizer.encode(self._as_read(prompt), truncation=True, max_length=limit + 1)) > limit
            for tokenizer, limit in zip(self._tokenizers, self._text_limits(), strict=True)
        )

    def _as_read(self, prompt: str) -> str:
        """Return the text that is tokenized for a prompt, for example a chat template around it."""
        return prompt

    def _tokens(self, number: int, prompts: Sequence[str]) -> torch.Tensor:
        """Return token ids [N, L] of the ``number``-th tokenizer, cut and padded, as the pipelines do."""
        return self._tokens_and_mask(number, prompts)[0]

    def _tokens_and_mask(
        self, number: int, prompts: Sequence[str], padding: str = "max_length"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return :meth:`_tokens`, and 1 where there is no padding: int64 [N, L]."""
        tokens = self._tokenizers[number](
            [self._as_read(prompt) for prompt in prompts],
            padding=padding,
            max_length=self._text_limits()[number],
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device)

    def posterior(self, pixels_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        return self.autoencoder.posterior(self._require_vae(), pixels_B3HW)

    def decode(self, latents_BChw: torch.Tensor, vae: nn.Module | None = None) -> torch.Tensor:
        """See the base class."""
        return self.autoencoder.decode(vae or self._require_vae(), latents_BChw)

    def decode_in_tiles(self, vae: nn.Module, side: int) -> None:
        """See the base class."""
        self.autoencoder.set_tile(vae, side)

    def to(self, device: torch.device | str) -> None:
        """See the base class."""
        self._device = torch.device(device)
        for module in (self.denoiser, self.vae, *self.text_modules):
            if module is not None:
                module.to(self._device)

    def _on_device(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self._device)

    def _require_vae(self) -> nn.Module:
        if self.vae is None:
            raise RuntimeError("this model was loaded without its VAE")
        return self.vae


def _encoder_settings(text: Any) -> dict[str, Any]:  # noqa: ANN401  (transformers' mixin has no type)
    config = text.config.get_text_config()
    settings = {name: getattr(config, name) for name in _TEXT_SETTINGS if hasattr(config, name)}
    # Fingerprints do not depend on the dtype, embeddings do.
    return settings if text.dtype == torch.float32 else settings | {"dtype": str(text.dtype)}


def _tokenizer_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from the last call: how its prompts were cut and padded.
    del backend["truncation"], backend["padding"]
    settings = {"tokens": sha256_json(backend), "pad": tokenizer.pad_token_id, "length": tokenizer.model_max_length}
    # Only what differs from the usual, so that settings of earlier versions stay equal.
    if tokenizer.padding_side != "right":
        settings["padding_side"] = tokenizer.padding_side
    if tokenizer.chat_template:
        settings["template"] = sha256_json(tokenizer.chat_template)
    return settings
