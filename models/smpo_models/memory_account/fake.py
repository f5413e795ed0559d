"""Denoisers on fake tensors, with the arithmetic of a GPU: shapes, types and lifetimes without any numbers.

Fake tensors of the CPU are used, whose attention kernel saves what the GPU's fused ones do: queries, keys, values, the
output and one number a row. torch has no fake GPU without CUDA's libraries.

Shape suffixes: R rows (images), C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from smpo_models.family import Conditioning, Family

_IN_FLOAT32 = {
    functional.group_norm,
    functional.layer_norm,
    functional.rms_norm,
    functional.softmax,
    functional.interpolate,
    torch.Tensor.exp,
    torch.Tensor.pow,
    torch.Tensor.softmax,
    torch.Tensor.sum,
    torch.exp,
    torch.pow,
    torch.rsqrt,
    torch.softmax,
    torch.sum,
}
"""Functions that autocast computes in float32 on a GPU, but not on a CPU."""


class GpuAutocast(TorchFunctionMode):
    """Makes the CPU's autocast follow the GPU's rules."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  (of any function)
        """Run a function; in float32 where the GPU's autocast does."""
        kwargs = dict(kwargs or {})
        if func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [_widened(value) for value in args]
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        if func is functional.rms_norm:
            # The GPU's fused kernel saves the input and one number a row, as this one does; the CPU's has many steps.
            input_, shape, weight, eps = _rms_norm_arguments(*args, **kwargs)
            return functional.layer_norm(input_, shape, weight, None, eps or 0.0)
        return func(*args, **kwargs)


def _rms_norm_arguments(
    input: torch.Tensor,  # noqa: A002  (torch's names)
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> tuple[torch.Tensor, Sequence[int], torch.Tensor | None, float | None]:
    return input, normalized_shape, weight, eps


def _widened(value: Any) -> Any:  # noqa: ANN401
    narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


@contextmanager
def fake_arithmetic(*, gpu: bool = True) -> Iterator[None]:
    """Make all new tensors fake in this context, and let autocast follow the rules of a GPU, or of the CPU."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        if gpu:
            stack.enter_context(GpuAutocast())
        yield


def make_fake(module: nn.Module) -> None:
    """Replace a module's tensors, in place, by fake ones; call it in :func:`fake_arithmetic`."""
    fakes: dict[int, torch.Tensor] = {}
    for part in module.modules():
        # `to_empty` cannot replace tensors by fake ones. Some modules keep tensors as plain attributes, or in lists.
        for tensors in (part._parameters, part._buffers, vars(part)):  # noqa: SLF001
            for name, value in tensors.items():
                if isinstance(value, torch.Tensor):
                    tensors[name] = fakes.setdefault(id(value), _fake(value))
                elif isinstance(value, list) and all(isinstance(each, torch.Tensor) for each in value):
                    value[:] = [fakes.setdefault(id(each), _fake(each)) for each in value]


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


@dataclass(frozen=True)
class Inputs:
    """The inputs of a denoiser: latents, timesteps, and the conditioning of prompts of the greatest length."""

    x_RChw: torch.Tensor
    t_R: torch.Tensor
    conditioning: Conditioning

    @classmethod
    def make(cls, family: Family, height: int, width: int, rows: int) -> Inputs:
        """Make the inputs for R = ``rows`` images of a size in pixels."""
        text = family.longest_text(rows)
        return cls(
            torch.zeros(rows, *family.latent_shape(height, width)),
            torch.zeros(rows, dtype=family.noise_schedule.timestep_dtype),
            family.conditioning(text, [(height, width)] * rows, [(0, 0)] * rows),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all inputs."""
        tensors = (self.x_RChw, self.t_R, self.conditioning.text_BLD, *self.conditioning.added.values())
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
