"""A sharded denoiser (FSDP2): its parameters, gradients and moments are DTensors.

Checkpoints hold full tensors, so that a run can resume with another sharding or none. On a denoiser that is not
sharded, these functions return their input.

torch.distributed.checkpoint.state_dict is not used, for three reasons. If the optimizer has no state yet, it takes a
step with learning rate 0, which changes AdamW's bias correction if the first steps of a run were skipped. While
loading, it holds the moments on the device twice, so that a run that fits might not resume. And it cannot shard the
moving average, which is not a module.
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
    """Read the FSDP options that `accelerate launch` passes in the environment; None without FSDP.

    Raises:
        UserError: the trainer does not support one of them.
    """
    # The trainer would save and average the shard of each process as if it were the model.
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError(
            "accelerate is configured for DeepSpeed or Megatron, which this trainer does not support; launch with "
            "`--multi_gpu`, or to save memory with `--use_fsdp --fsdp_version 2`"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    unsupported = {
        "version 1 (the default; give --fsdp_version 2)": os.environ.get("FSDP_VERSION", "1") != "2",
        "--use_parallelism_config": parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"),
        "--fsdp_offload_params": parse_flag_from_env("FSDP_OFFLOAD_PARAMS"),
        # The gradients of ignored modules would not be averaged.
        "--fsdp_ignored_modules": bool(os.environ.get("FSDP_IGNORED_MODULES")),
        # Its wrapper renames the weights.
        "--fsdp_activation_checkpointing (use --gradient-checkpointing)": parse_flag_from_env(
            "FSDP_ACTIVATION_CHECKPOINTING"
        ),
        f"--optimizer {settings.optimizer.optimizer} (use adamw)": settings.optimizer.optimizer != "adamw",
        "--dtype fp16 (use bf16)": settings.compute.dtype == "fp16",
        "--compile": settings.compute.compile,
        "--quantize": settings.denoiser.quantize is not None,
    }
    given = [name for name, is_given in unsupported.items() if is_given]
    if given:
        raise UserError(f"this trainer does not support FSDP with {', '.join(given)}")
    try:
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            # Gather weights in float32 and leave casting to autocast, as without FSDP. The reference errors, computed
            # before the denoiser is sharded, then have the same arithmetic.
            mixed_precision_policy=MixedPrecisionPolicy(),
            # All processes load and check the models; otherwise transformers gives empty ones to all but the first.
            cpu_ram_efficient_loading=False,
        )
    except ValueError as error:
        raise UserError(f"accelerate's configuration of FSDP: {error}") from error


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor in every process. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full(state: Any, *, keep: bool) -> Any:  # noqa: ANN401  (nested containers)
    """Replace sharded tensors in nested dicts and lists by full ones on the CPU. Collective if there are any.

    Only one full tensor at a time is on the device.

    Args:
        state: state dict of a module, an optimizer, ...
        keep: whether this process needs the result; if not, it gets empty tensors.
    """
    if isinstance(state, DTensor):
        tensor = full_tensor(state.detach())
        return tensor.cpu() if keep else tensor.new_empty(0)
    if isinstance(state, dict):
        return {name: gather_full(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list):
        return [gather_full(value, keep=keep) for value in state]
    return state


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Move a full tensor, present in all processes, to a parameter's device, and shard it like the parameter."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    # src_data_rank=None: every process takes its shard of its own copy, without communication.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def reshard(module: nn.Module) -> None:
    """Free the parameters that a forward without a backward has gathered.

    Otherwise the next forward would use them even if the weights have changed, and until then the parameters of the
    module are not the trained ones.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """Return the original class of a module; sharding replaces it by a subclass."""
    return next(base for base in type(module).__mro__ if not issubclass(base, FSDPModule))
