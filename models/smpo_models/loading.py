"""Loading a text-to-image model by hub id or folder: finds its family."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

import smpo_models.families
from smpo_models.family import Family
from smpo_models.weights import loading_errors
from smpo_schemas.discovery import subclasses_in
from smpo_schemas.errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What a LoRA training run leaves behind, under the name that diffusers knows."""

_LORA_PREFIX = "unet"

_LORA_SETTINGS = "lora_adapter_metadata"
"""Where diffusers keeps a LoRA's alpha and the like, in the file's header."""


class _Loader(Protocol):
    """Signature of a family's constructor."""

    def __call__(
        self,
        model: str,
        parts: Collection[str],
        *,
        denoiser: Path | None,
        vae: str | None,
        device: torch.device,
    ) -> Family: ...


def families() -> dict[str, type[Family]]:
    """Every family by the pipeline class names it is for; a new file in ``smpo_models/families`` is found by itself."""
    found = subclasses_in(smpo_models.families, Family)  # type: ignore[type-abstract]
    return {name: family for family in found for name in getattr(family, "pipelines", ())}


def load_family(
    model: str,
    parts: Collection[str] = ("denoiser", "text", "vae"),
    *,
    denoiser: Path | None = None,
    vae: str | None = None,
    device: torch.device | str = "cpu",
) -> Family:
    """Load the named parts of a text-to-image model, all in float32 (fingerprint first, cast then).

    Args:
        model: hub id, or a folder in the diffusers pipeline layout.
        parts: any of ``denoiser``, ``text`` and ``vae``; the rest is not loaded.
        denoiser: folder of a denoiser in place of the model's own.
        vae: hub id or folder of a VAE in place of the model's own.
        device: for all parts.

    Raises:
        UserError: the model is missing, incomplete, or of a family that no file here is for.
    """
    with loading_errors(f"--model {model}"):
        index: dict[str, Any] = DiffusionPipeline.load_config(model)
    known = families()
    name = index.get("_class_name", "")
    if name not in known:
        raise UserError(f"--model {model} is a {name or 'folder without model_index.json'}; known: {', '.join(known)}")
    loader = cast("_Loader", known[name])
    return loader(model, parts, denoiser=denoiser, vae=vae, device=torch.device(device))


def load_walker(family: Family, model: str, path: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The denoiser that a training run left behind: a folder of one, or a LoRA file on top of ``family``'s own.

    Args:
        family: the model, with the denoiser that training started from.
        model: its hub id or folder.
        path: a denoiser folder, a training run's output folder, or a LoRA file.
        device: for the denoiser.

    Raises:
        UserError: there is neither, or it does not fit the model.
    """
    lora = path if path.is_file() else path / LORA_FILE
    if not lora.is_file():
        return _own(load_family(model, ("denoiser",), denoiser=path, device=device))
    walker = copy.deepcopy(_own(family))
    fuse_lora(walker, lora, f"--walker {path}", f"--model {model}")
    return walker.requires_grad_(False).eval()


def fuse_lora(denoiser: Any, lora: Path, what: str, of: str) -> None:  # noqa: ANN401  (diffusers' mixin has no type)
    """Add a LoRA file to the weights of a denoiser: alpha / rank times B A, with the alpha that diffusers' header says.

    Args:
        denoiser: is changed.
        lora: the file.
        what: starts the error.
        of: whose denoiser it is, for the error.

    Raises:
        UserError: it cannot be read, or a layer of it does not fit.
    """
    with loading_errors(what):
        layers = safetensors.torch.load_file(lora)
        with safe_open(lora, "pt") as file:
            settings = json.loads((file.metadata() or {}).get(_LORA_SETTINGS, "{}"))
        # Where the file says nothing, diffusers takes alpha to be the rank; of settings of another part it would take
        # none, and fill in its library's defaults.
        own = {name: value for name, value in settings.items() if name.startswith(f"{_LORA_PREFIX}.")} or None
        # diffusers logs what does not fit over many lines, and goes on without any of it.
        logger = logging.getLogger("diffusers.loaders.peft")
        logger.disabled = True
        try:
            denoiser.load_lora_adapter(layers, prefix=_LORA_PREFIX, adapter_name=_LORA_PREFIX, metadata=own)
        finally:
            logger.disabled = False
        known = _LORA_PREFIX in getattr(denoiser, "peft_config", {})
        fitting = get_peft_model_state_dict(denoiser, adapter_name=_LORA_PREFIX) if known else {}
    if len(fitting) != len(layers):
        raise UserError(f"{what}: of its {len(layers)} layers only {len(fitting)} fit the denoiser of {of}")
    denoiser.fuse_lora()
    denoiser.unload_lora()


def _own(family: Family) -> nn.Module:
    if family.denoiser is None:
        raise RuntimeError("the model was loaded without its denoiser")
    return family.denoiser


def denoiser_folder(path: Path) -> Path:
    """Where a denoiser's config lies: the folder itself, or its ``unet`` (a training run's output, a pipeline).

    Raises:
        UserError: in neither.
    """
    for folder in (path, path / "unet"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path} holds no denoiser: neither config.json nor unet/config.json is there")
