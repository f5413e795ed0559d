"""Configs of a model's parts, before any weights are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from smpo_common.errors import UserError


def complete(kind: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the library's defaults for settings that a config leaves out, as older ones do."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty} | dict(config)


def subfolder(name: str, inside_model: bool) -> dict[str, str]:
    """Return the option of ``from_pretrained`` that finds a part inside a model; empty for a part's own folder."""
    return {"subfolder": name} if inside_model else {}


def native_resolution(sample_size: int | Sequence[int] | None, latent_factor: int, what: str, folder: str) -> int:
    """Return the side, in pixels, of the square images that a denoiser was made for.

    Args:
        sample_size: the setting in its config: the side of its latents, or both sides.
        latent_factor: pixels per latent position, along one side.
        what: starts the error.
        folder: the denoiser's folder in the model.

    Raises:
        UserError: the config gives no side, or two different ones.
    """
    height, width = sample_size if isinstance(sample_size, Sequence) else (sample_size, sample_size)
    if height is None or height != width:
        raise UserError(
            f"{what}: sample_size in its {folder}/config.json is {sample_size}, which names no square; "
            "name the side of its images with --resolution"
        )
    return height * latent_factor
