"""A tiny model of every family with a transformer, by its kind: what tests of all families run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.tiny.lumina import make_tiny_lumina2
from tests.tiny.qwen import make_tiny_klein, make_tiny_qwen_image
from tests.tiny.transformers import make_tiny_pixart, make_tiny_sana, make_tiny_z_image

FLOW_FAMILIES: dict[str, Callable[..., Path]] = {
    "sd35": make_tiny_sd3,
    "flux1-dev": make_tiny_flux,
    "qwen-image": make_tiny_qwen_image,
    "flux2-klein": make_tiny_klein,
    "z-image": make_tiny_z_image,
    "sana": make_tiny_sana,
    "lumina2": make_tiny_lumina2,
}
"""Makers of a folder: ``make(path, seed=0)``, and settings of the scheduler."""

FAMILIES = FLOW_FAMILIES | {"pixart-sigma": make_tiny_pixart}
