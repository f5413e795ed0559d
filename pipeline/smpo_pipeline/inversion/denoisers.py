"""The denoisers of a job that makes shards: the reference, and the one that makes the trajectories.

Shape suffixes: S states of one image each, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from smpo_models.arithmetic import narrow_products, narrowed
from smpo_models.family import Conditioning, Family
from smpo_models.weights import DTYPES


@dataclass(frozen=True)
class Measured:
    """The reference at S stored states.

    Attributes:
        x_SChw: the states, rebuilt as the trainer does.
        output_SChw: its output there, float32.
        error_S: ``ref_error``.
        norm_S: ``ref_norm``.
    """

    x_SChw: torch.Tensor
    output_SChw: torch.Tensor
    error_S: torch.Tensor
    norm_S: torch.Tensor


class Denoisers:
    """The reference, in the arithmetic of training, and the denoiser that makes the trajectories."""

    def __init__(self, family: Family, inverting: nn.Module | None, dtype: str, device: str) -> None:
        """Take a loaded model, all parts, on the CPU; cast its weights, and move it to a device.

        Args:
            family: the model; its denoiser is the reference that ``ref_error`` is measured with, in the arithmetic of
                training: products in ``dtype`` by autocast, norms in float32.
            inverting: the denoiser that makes the trajectories; None: the reference itself. All its weights are cast to
                ``dtype``.
            dtype: as ``--dtype`` names it.
            device: cpu or cuda.
        """
        if family.denoiser is None:
            raise RuntimeError("the model was loaded without its denoiser")
        self._family = family
        self.reference: nn.Module = family.denoiser
        self.reference_inverts = inverting is None or inverting is self.reference
        self._autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        narrow = DTYPES[dtype]
        made = inverting or self.reference
        # Cast before moving: two denoisers in float32 would take twice the device memory that they need.
        if narrow != torch.float32:
            self._autocast = partial(torch.autocast, device, narrow)
            narrow_products(self.reference, narrow)
            if not self.reference_inverts:
                made = narrowed(made, narrow)
        family.to(device)
        made.to(device)
        if narrow != torch.float32 and self.reference_inverts:
            made = narrowed(self.reference, narrow)  # after moving, so that it shares the weights of products
        self.inverting: nn.Module = made

    def refer(self, x_SChw: torch.Tensor, t_S: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the reference's output, float32 [S, C, h, w]."""
        with self._autocast():
            return self._family.denoise(self.reference, x_SChw, t_S, conditioning)

    def measure(
        self, x0_SChw: torch.Tensor, noise_SChw: torch.Tensor, t_S: torch.Tensor, conditioning: Conditioning
    ) -> Measured:
        """Measure the reference at stored, already rounded states: the very ones that the trainer rebuilds."""
        schedule, x0, noise = self._family.noise_schedule, x0_SChw.float(), noise_SChw.float()
        x_t = schedule.noised(x0, noise, t_S)
        output = self.refer(x_t, t_S, conditioning)
        error = (output - schedule.target(x0, noise, t_S)).square().mean((1, 2, 3))
        return Measured(x_t, output, error, output.square().mean((1, 2, 3)).sqrt())


def guided_output(
    output: Callable[[Conditioning], torch.Tensor],
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    scale: float,
) -> torch.Tensor:
    """Return a denoiser's output with guidance (arXiv 2207.12598).

    Args:
        output: of the denoiser under a conditioning.
        conditioning: of the prompts.
        unconditional: of the empty prompt; None for no guidance.
        scale: of the guidance; at 0 the output for the prompts is not computed.
    """
    if unconditional is None:
        return output(conditioning)
    free = output(unconditional)
    return free if scale == 0 else free + scale * (output(conditioning) - free)
