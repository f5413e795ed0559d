"""A denoiser cut up over the processes of a run (FSDP 2): its parameters, gradients and moments are DTensors.

What is saved is whole, so that a run may go on cut up otherwise, or not at all. The same calls on a denoiser that is
not cut up leave everything as it is.

torch.distributed.checkpoint.state_dict is not used. It takes an optimizer step (learning rate 0) where the optimizer
has no state yet, which counts in AdamW's bias correction if a run's first steps were skipped. Where it loads, it holds
the moments on the device twice, so that a run that fits may not resume. A moving average is not a module.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from smpo_common.errors import UserError
from smpo_trainer.settings import TrainSettings


def fsdp_plugin(settings: TrainSettings) -> FullyShardedDataParallelPlugin | None:
    """How `accelerate launch`, which hands it on in the environment, has the denoiser cut up; None: not at all.

    Raises:
        UserError: in a way that this trainer does not support.
    """
    # It would train, and then save and average each process's piece as if it were the model.
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "accelerate is configured for DeepSpeed or Megatron, which this trainer does not support; launch with "
            "`--multi_gpu`, or, where memory is short, with `--use_fsdp --fsdp_version 2`"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    unsupported = {
        "version 1 (the default; give --fsdp_version 2)": os.environ.get("FSDP_VERSION", "1") != "2",
        "--use_parallelism_config": parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"),
        "--fsdp_offload_params": parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
        # Nobody would average the gradients of such modules.
        "--fsdp_ignored_modules": bool(os.environ.get("FSDP_IGNORED_MODULES")),
        # It renames the weights.
        "--fsdp_activation_checkpointing (use --gradient-checkpointing)": parse_flag_from_env(
            "FSDP_ACTIVATION_CHECKPOINTING"
        ),
        f"--optimizer {settings.optimizer.optimizer} (use adamw)": settings.optimizer.optimizer != "adamw",
        "--dtype fp16 (use bf16)": settings.compute.dtype == "fp16",
        "--compile": settings.compute.compile,
    }
    found = [name for name, is_given in unsupported.items() if is_given]
    if found:
        raise UserError(f"this trainer does not support FSDP with {', '.join(found)}")
    try:
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            # Weights are gathered in float32 and cast by autocast, as they are without FSDP: the same arithmetic, also
            # as that of the reference's errors, which are computed before the denoiser is cut up.
            mixed_precision_policy=MixedPrecisionPolicy(),
            # All processes load, and check, the models; told otherwise, transformers gives all but one empty ones.
            cpu_ram_efficient_loading=False,
        )
    except ValueError as error:
        raise UserError(f"accelerate's configuration of FSDP: {error}") from error


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
    """Let go of what a forward without a backward has gathered.

    The next forward would take it, even if the weights have changed since; and until then, parameters of the module are
    not those that are trained.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was cut up, which gave it one derived from it."""
    return next(each for each in type(module).__mro__ if not issubclass(each, FSDPModule))
