"""Load a text-to-image model by hub id or folder; its family is found by its pipeline class."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

import smpo_models.families
from smpo_common.discovery import subclasses_in
from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_models.tuned.lora import fuse_lora
from smpo_models.weights import load_part
from smpo_schemas.trained_model import LORA_FILE


class _Loader(Protocol):
    """Signature of a family's constructor."""

    def __call__(
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
    ) -> Family: ...


def families() -> dict[str, type[Family]]:
    """Return every family by the names of its pipeline classes; new files in ``smpo_models/families`` are included."""
    found = subclasses_in(smpo_models.families, Family)  # type: ignore[type-abstract]
    return {name: family for family in found for name in getattr(family, "pipelines", ())}


def load_family(
    model: str,
    parts: Collection[str] = ("denoiser", "text", "vae"),
    *,
    denoiser: Path | None = None,
    vae: str | None = None,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    denoiser_dtype: torch.dtype = torch.float32,
    what: str | None = None,
) -> Family:
    """Load the named parts of a text-to-image model, in float32 (fingerprint first, cast then).

    Without any part, only configs are read and checked.

    Args:
        model: hub id, or a folder in the diffusers pipeline layout.
        parts: any of ``denoiser``, ``text`` and ``vae``; the rest is not loaded.
        denoiser: folder of a denoiser in place of the model's own.
        vae: hub id or folder of a VAE in place of the model's own.
        variant: of the files of weights, for example ``fp16``.
        device: for all parts. On ``meta`` they are made from their configs alone, without weights and tokenizers.
        denoiser_dtype: that the caller will cast the denoiser's products to, after fingerprinting it
            (:func:`smpo_models.arithmetic.narrow_products`). If its files hold weights of this dtype alone, they are
            loaded in it: the same values, and so the same fingerprint, in half the memory.
        what: names the model in errors; default: ``--model`` and its name.

    Raises:
        UserError: the model is missing, incomplete, or of a family that is not supported.
    """
    what = what or f"--model {model}"
    index: dict[str, Any] = load_part(DiffusionPipeline.load_config, model, what)
    known = families()
    name = index.get("_class_name", "")
    if name not in known:
        raise UserError(f"{what} is a {name or 'folder without model_index.json'}; known: {', '.join(known)}")
    loader = cast("_Loader", known[name])
    return loader(
        model,
        parts,
        denoiser=denoiser,
        vae=vae,
        variant=variant,
        device=torch.device(device),
        denoiser_dtype=denoiser_dtype,
        what=what,
    )


def load_tuned_denoiser(family: Family, model: str, path: Path, what: str, variant: str | None = None) -> nn.Module:
    """Load the denoiser that a training run left behind: a folder of one, or a LoRA file on top of ``family``'s own.

    Args:
        family: the model, with the denoiser that training started from.
        model: its hub id or folder.
        path: a denoiser folder, a training run's output folder, or a LoRA file.
        what: names the LoRA in errors.
        variant: of a folder's files of weights, where it has several.

    Raises:
        UserError: the path holds neither a denoiser nor a LoRA, or what it holds does not fit the model.
    """
    lora = path if path.is_file() else path / LORA_FILE
    if not lora.is_file():
        return _own(load_family(model, ("denoiser",), denoiser=path, variant=variant))
    tuned = nn.Module.float(copy.deepcopy(_own(family)))
    fuse_lora(tuned, lora, what, f"--model {model}")
    return tuned.requires_grad_(False).eval()


def _own(family: Family) -> nn.Module:
    if family.denoiser is None:
        raise RuntimeError("the model was loaded without its denoiser")
    return family.denoiser


def denoiser_folder(path: Path, name: str) -> Path:
    """Return the folder with a denoiser's config: the path itself, or its sub-folder ``name``.

    Args:
        path: a denoiser's folder, a training run's output, or a pipeline.
        name: ``unet`` or ``transformer``.

    Raises:
        UserError: neither folder has a config.
    """
    for folder in (path, path / name):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path} holds no denoiser: neither config.json nor {name}/config.json is there")
