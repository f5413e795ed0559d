"""Calculate how much GPU memory ``smpo-pipeline invert`` needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from smpo_models.arithmetic import narrow_products
from smpo_models.family import Family
from smpo_models.memory_account.fake import Inputs, fake_arithmetic, make_fake
from smpo_models.memory_account.live import LiveTensors
from smpo_models.memory_account.training import tensor_bytes
from smpo_models.weights import DTYPES
from smpo_schemas.choices import Dtype


@dataclass(frozen=True)
class InversionRun:
    """A run of ``invert``, by its flags.

    Attributes:
        height, width: of the images, in pixels.
        batch_size: trajectories of a batch, two images each.
        dtype: of the denoisers.
        holds_text: whether the text encoders are in memory (``--text live``).
        own_inverting_denoiser: whether the reference inverts.
        encodes_images: whether images are encoded; not needed where their latents are known.
    """

    height: int
    width: int
    batch_size: int = 16
    dtype: Dtype = "bf16"
    holds_text: bool = False
    own_inverting_denoiser: bool = True
    encodes_images: bool = True


@dataclass(frozen=True)
class InversionMemory:
    """Bytes at the peak, by what they are for.

    Attributes:
        weights: weights of the denoisers.
        vae: weights of the VAE, in float32.
        text_encoders: weights of the text encoders, if they are held together with the denoisers.
        encoding: activations at the peak of encoding a batch of images.
        denoising: activations at the peak of a denoiser's forward.
        stored_text_encoders: weights of the text encoders, if they run in a stage of their own before.
    """

    weights: int
    vae: int
    text_encoders: int
    encoding: int
    denoising: int
    stored_text_encoders: int

    @property
    def total(self) -> int:
        """Bytes of GPU memory in all."""
        inverting = self.weights + self.vae + self.text_encoders + max(self.encoding, self.denoising)
        return max(inverting, self.stored_text_encoders)


def account_inversion(family: Family, run: InversionRun) -> InversionMemory:
    """Calculate the memory of a run.

    Args:
        family: with its VAE and text encoders, on the meta device; the VAE's tensors are replaced by fake ones.
        run: what is inverted, and how.
    """
    dtype = DTYPES[run.dtype]
    reference, inverting = (family.empty_denoiser().requires_grad_(False).eval() for _ in range(2))
    narrow_products(reference, dtype)
    nn.Module.to(inverting, dtype)
    shared = 0
    if run.own_inverting_denoiser:  # it shares the weights that are narrow in both
        shared = tensor_bytes([each for each in reference.parameters() if each.dtype == dtype])
    text = sum(tensor_bytes(module.parameters()) for module in family.text_modules)
    weights = sum(tensor_bytes([*each.parameters(), *each.buffers()]) for each in (reference, inverting)) - shared
    vae = tensor_bytes(family.vae.parameters()) if family.vae is not None else 0
    with fake_arithmetic(), torch.no_grad():
        if family.vae is not None:
            make_fake(family.vae)
        denoising = max(_forward(family, reference, run, dtype), _forward(family, inverting, run, None))
        encoding = _encode(family, run) if run.encodes_images else 0
    return InversionMemory(
        weights=weights,
        vae=vae,
        text_encoders=text if run.holds_text else 0,
        encoding=encoding,
        denoising=denoising,
        stored_text_encoders=0 if run.holds_text else text,
    )


def _forward(family: Family, denoiser: nn.Module, run: InversionRun, autocast: torch.dtype | None) -> int:
    """Return the peak bytes of a batch's forward, inputs included; under autocast if a dtype is given."""
    make_fake(denoiser)
    with LiveTensors() as live:
        inputs = Inputs.make(family, run.height, run.width, 2 * run.batch_size)
        with torch.autocast("cpu", autocast, enabled=autocast not in (None, torch.float32)):
            family.denoise(denoiser, inputs.x_RChw, inputs.t_R, inputs.conditioning)
    return live.peak


def _encode(family: Family, run: InversionRun) -> int:
    """Return the peak bytes while a batch's images are encoded."""
    if family.vae is None:
        return 0
    with LiveTensors() as live:
        family.posterior(torch.zeros(2 * run.batch_size, 3, run.height, run.width))
    return live.peak
