"""Loading a model by hub id or folder: finds the family, turns loading failures into one line."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

import smpo_models.families
from smpo_models.family import Family
from smpo_schemas.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    for module in pkgutil.iter_modules(smpo_models.families.__path__):
        importlib.import_module(f"{smpo_models.families.__name__}.{module.name}")
    return {name: family for family in Family.__subclasses__() for name in family.pipelines}


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


@contextmanager
def loading_errors(what: str) -> Iterator[None]:
    """Turn what the loading libraries raise for a missing or unfit model into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0][:300]
        raise UserError(f"{what} cannot be loaded: {first}") from error


def load_part(loader: Callable[..., Any], source: str | None, what: str, **options: Any) -> Any:  # noqa: ANN401
    """``loader(source, **options)`` (a ``from_pretrained``) with errors in one line; ``what`` names the part."""
    with loading_errors(what):
        return loader(source, **options)


def load_weights(loader: Callable[..., Any], source: str | None, what: str, **options: Any) -> Any:  # noqa: ANN401
    """Like :func:`load_part`, for parts with weights: none of them may be missing from the checkpoint.

    The libraries fill what is missing with random values, and go on. transformers refuses weights of another shape
    without naming one; with ``ignore_mismatched_sizes`` they are refused here, by name.

    Raises:
        UserError: the part cannot be loaded, or its checkpoint is incomplete or of other shapes.
    """
    module, report = load_part(loader, source, what, output_loading_info=True, **options)
    lacking = sorted(report["missing_keys"])
    others = sorted(each[0] for each in report["mismatched_keys"])
    subject = f"{what}: the checkpoint of its {type(module).__name__}"
    if lacking:
        raise UserError(f"{subject} lacks {len(lacking)} weights, first {lacking[0]}")
    if others:
        raise UserError(f"{subject} has {len(others)} weights of another shape, first {others[0]}")
    return module


def denoiser_folder(path: Path) -> Path:
    """Where a denoiser's config lies: the folder itself, or its ``unet`` (a training run's output, a pipeline).

    Raises:
        UserError: in neither.
    """
    for folder in (path, path / "unet"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path} holds no denoiser: neither config.json nor unet/config.json is there")
