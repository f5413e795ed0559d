"""LoRAs of a denoiser: add a new one; read, check and fuse files in diffusers' format or, for UNets, in kohya's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from smpo_common.errors import UserError
from smpo_models.weights import loading_errors

_UNET, _TRANSFORMER = "unet", "transformer"
"""Start of a layer's name in diffusers' format: the denoiser's name in a pipeline."""

_ADAPTER = "loaded"
LORA_SETTINGS = "lora_adapter_metadata"
"""Where diffusers keeps a LoRA's alpha and the like, in the file's header."""

_KOHYA = "lora_unet_"
"""Start of a layer's name in the files of kohya's trainers."""


@dataclass(frozen=True)
class Lora:
    """The contents of a LoRA file.

    Attributes:
        layers: tensors by diffusers' names, prefix included.
        alphas: alpha of each layer if the file is in kohya's format; else None.
        settings: the adapter's settings that diffusers wrote into the file's header; None if there are none.
        what: starts errors.
        prefix: start of the layers' names.
    """

    layers: dict[str, torch.Tensor]
    alphas: dict[str, float] | None
    settings: dict[str, Any] | None
    what: str
    prefix: str


def read_lora(path: Path, kind: type, config: Mapping[str, Any], what: str) -> Lora:
    """Read a LoRA file; one in kohya's format is converted by diffusers.

    Args:
        path: the file.
        kind: class of the denoiser that it is for.
        config: of that denoiser, from which diffusers converts kohya's block numbers.
        what: starts the error.

    Raises:
        UserError: it cannot be read, is in another format, or changes more than the denoiser.
    """
    with loading_errors(what):
        layers = safetensors.torch.load_file(path)
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get(LORA_SETTINGS, "{}"))
    others = sorted(key for key in layers if key.startswith(("lora_te", "text_encoder")))
    if others:
        raise UserError(
            f"{what}: {len(others)} of its {len(layers)} layers change the text encoder, first {others[0]}; "
            "only LoRAs of the denoiser alone are known"
        )
    alphas, prefix = None, _prefix(kind)
    if prefix == _UNET and any(key.startswith(_KOHYA) for key in layers):
        layers, alphas = _convert(layers, config, what)
    if unfit := sorted(key for key in layers if not key.startswith(f"{prefix}.")):
        named = f"neither as diffusers names them ({prefix}.*) nor as kohya does ({_KOHYA}*)"
        if prefix == _TRANSFORMER:
            named = f"otherwise than diffusers names them ({prefix}.*)"
        raise UserError(f"{what}: its layers are named {named}, first {unfit[0]}; convert it to such a format")
    # Without settings, diffusers takes alpha to be the rank. Given only those of another part, it would find none for
    # the denoiser and use PEFT's defaults.
    own = {name: value for name, value in settings.items() if name.startswith(f"{prefix}.")} or None
    return Lora(layers, alphas, own, what, prefix)


def _convert(
    layers: dict[str, torch.Tensor], unet_config: Mapping[str, Any], what: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    # diffusers drops dora_scale with a warning, and fails on LoHa and LoKr without naming them.
    unknown = sorted(key for key in layers if not key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")))
    if unknown:
        raise UserError(
            f"{what}: a file in kohya's format, but no plain LoRA ({unknown[0]}), which diffusers cannot convert; "
            "merge it into the denoiser with its own tools"
        )
    with loading_errors(what):
        return StableDiffusionPipeline.lora_state_dict(dict(layers), unet_config=unet_config)


def _prefix(kind: type) -> str:
    return _UNET if issubclass(kind, UNet2DConditionModel) else _TRANSFORMER


def check_lora(path: Path, denoiser: Any, what: str, of: str) -> None:  # noqa: ANN401  (diffusers' mixin has no type)
    """Check that a LoRA file can be read and fits a denoiser, without its weights.

    Args:
        path: the file.
        denoiser: on the meta device (:meth:`smpo_models.family.Family.empty_denoiser`); is changed.
        what: starts the error.
        of: whose denoiser it is, for the error.

    Raises:
        UserError: it cannot be read, or a layer of it does not fit.
    """
    _add(denoiser, read_lora(path, type(denoiser), denoiser.config, what), of)


def fuse_lora(denoiser: Any, path: Path, what: str, of: str) -> None:  # noqa: ANN401  (diffusers' mixin has no type)
    """Add a LoRA file to the weights of a denoiser: alpha / rank times B A, with the file's alpha.

    Args:
        denoiser: is changed in place.
        path: the file.
        what: starts the error.
        of: whose denoiser it is, for the error.

    Raises:
        UserError: it cannot be read, or a layer of it does not fit.
    """
    _add(denoiser, read_lora(path, type(denoiser), denoiser.config, what), of)
    denoiser.fuse_lora()
    denoiser.unload_lora()


def _add(denoiser: Any, lora: Lora, of: str) -> None:  # noqa: ANN401
    """Attach the adapter to the denoiser.

    Raises:
        UserError: the denoiser takes no LoRA, or a layer does not fit.
    """
    if not hasattr(denoiser, "load_lora_adapter"):
        raise UserError(f"{lora.what}: diffusers has no LoRA for the denoiser of {of} ({type(denoiser).__name__})")
    # diffusers logs over many lines which layers do not fit, and continues without them.
    logger = logging.getLogger("diffusers.loaders.peft")
    logger.disabled = True
    try:
        with loading_errors(lora.what):
            denoiser.load_lora_adapter(
                lora.layers,
                prefix=lora.prefix,
                adapter_name=_ADAPTER,
                network_alphas=lora.alphas,
                metadata=lora.settings,
                # On the meta device there is nothing to copy weights into.
                low_cpu_mem_usage=denoiser.device.type == "meta",
            )
            known = _ADAPTER in getattr(denoiser, "peft_config", {})
            fitting = get_peft_model_state_dict(denoiser, adapter_name=_ADAPTER) if known else {}
    finally:
        logger.disabled = False
    if len(fitting) != len(lora.layers):
        raise UserError(
            f"{lora.what}: of its {len(lora.layers)} layers only {len(fitting)} fit the denoiser of {of}; "
            "it was probably made for another base model"
        )


def add_lora(
    denoiser: nn.Module, targets: Sequence[str], rank: int, alpha: float | None = None, idle: Sequence[str] = ()
) -> None:
    """Add an adapter to the layers whose names end in one of ``targets``.

    Its output is multiplied by alpha / rank, by default by 1. Before training it changes nothing: its B matrices are 0.
    Layers whose names start with one of ``idle`` get none.
    """
    ends = tuple(f".{target}" for target in targets)
    layers = {
        name: layer
        for name, layer in denoiser.named_modules()
        if name.endswith(ends) and not name.startswith(tuple(idle))
    }
    for layer in layers.values():
        layer.float()  # PEFT rounds the adapter's initial values to the layer's dtype
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=list(layers if idle else targets),
        lora_dropout=0.0,
    )
    denoiser.add_adapter(config)
    cast_training_params(denoiser)  # to float32: on 4-bit weights PEFT gives the adapter the dtype of their products
