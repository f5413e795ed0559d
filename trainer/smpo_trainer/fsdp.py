"""A denoiser cut up over the processes of a run (FSDP 2): its parameters, gradients and moments are DTensors.

What is saved is whole, so that a run may go on cut up otherwise, or not at all. The same calls on a denoiser that is
not cut up leave everything as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of one that is cut up for all processes at once, each of which gets it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(state: Any, *, keep: bool) -> Any:  # noqa: ANN401  (nested as it may be)
    """The same nested dicts and lists with whole tensors in the place of those cut up; for all processes at once.

    One tensor at a time is whole on the device; those that are gathered lie on the CPU.

    Args:
        state: of a module, an optimizer, ...
        keep: whether this process needs the result; without, it has an empty tensor in the place of each.
    """
    if isinstance(state, DTensor):
        tensor = whole(state.detach())
        return tensor.cpu() if keep else tensor.new_empty(0)
    if isinstance(state, dict):
        return {name: gather(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list):
        return [gather(value, keep=keep) for value in state]
    return state


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which all processes have, on the device of a parameter of the same shape, and cut up as it is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Let go of the weights that a forward without a backward gathered: the next would take them, also if they changed.

    Until then, parts of the module may have whole parameters, which are not those that are trained.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was cut up, which gave it one derived from it."""
    return next(each for each in type(module).__mro__ if not issubclass(each, FSDPModule))
