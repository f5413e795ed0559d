"""Set up the device and the processes of a run, from flags and the launcher's environment."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env

from smpo_common.errors import UserError
from smpo_models.devices import default_dtype, gpus_are_hidden, no_gpu, refuse_silent_cpu
from smpo_schemas.choices import Dtype
from smpo_trainer.model.fsdp import fsdp_plugin
from smpo_trainer.output.run_folder import dtype_of_run
from smpo_trainer.settings import Device, TrainSettings

_TIMEOUT = timedelta(hours=6)
"""How long a collective waits for the other processes. One of them may work alone for long (loading over a slow
network, encoding prompts, drawing images, writing checkpoints), and NCCL's default of 10 minutes would end the run."""

_PATIENCE_SECONDS = 10.0
"""After this time, print that the process waits for the others to start."""

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables that hold the rank, for the launchers that accelerate supports."""


def choose_dtype(settings: TrainSettings) -> TrainSettings:
    """Fill in the dtype: that of the flag, of the run to resume, of the launcher, or else the default of the device.

    A resumed run keeps its dtype whatever the launcher says, since an unconfigured `accelerate launch` says fp32.

    Raises:
        UserError: accelerate is configured for an unsupported precision.
    """
    if settings.compute.dtype is not None:
        return settings
    earlier = None if settings.overwrite else dtype_of_run(settings.out)
    if earlier is not None:
        return settings.replace(dtype=earlier)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    on_cpu = settings.compute.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    device = "cpu" if on_cpu or not torch.cuda.is_available() else "cuda"
    dtype = {"no": "fp32", None: default_dtype(device)}.get(launched, launched)
    if dtype not in get_args(Dtype):
        raise UserError(f"accelerate's mixed_precision {launched} is not supported; give --dtype bf16, fp16 or fp32")
    return settings.replace(dtype=cast("Dtype", dtype))


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Join the process group of the run and select this process's device.

    Args:
        settings: with a dtype, as :func:`choose_dtype` returns them.

    Raises:
        UserError: the device does not exist or does not support a setting, or the launcher's environment is incomplete.
    """
    # Before the process group: a refused configuration must not leave other processes waiting.
    fsdp = fsdp_plugin(settings)
    _require_whole_environment()
    compute = settings.compute
    # Pass `cpu` explicitly: without GPUs, accelerate would let the processes of torchrun train independently.
    on_cpu = _uses_cpu(compute.device)
    if compute.compile:
        _require_compiler()
    try:
        with _announce_long_wait():
            accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="no" if compute.dtype == "fp32" else compute.dtype,
                fsdp_plugin=fsdp,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
                # The trainer accumulates itself; by default accelerate would divide each loss by a number from the
                # environment.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )
    except ValueError as error:  # the device does not support the dtype
        raise UserError(f"--dtype {compute.dtype}: {error}") from error
    if fsdp and not accelerator.is_fsdp2:
        raise UserError("accelerate is configured for FSDP, but FSDP needs several processes, each with its own GPU")
    # Accelerate would silently train in float32.
    if compute.dtype == "fp16" and accelerator.device.type != "cuda":
        raise UserError(f"--dtype fp16 needs a GPU, the device is {accelerator.device}; use bf16 or fp32")
    if compute.tf32:
        if accelerator.device.type != "cuda":
            raise UserError(f"--tf32 needs an NVIDIA GPU, the device is {accelerator.device}; leave it out")
        torch.set_float32_matmul_precision("high")
    # Compute convolutions in float32, as the inversion did for the reference: by default cuDNN uses TF32.
    torch.backends.cudnn.allow_tf32 = compute.tf32
    return accelerator


def describe(accelerator: Accelerator, settings: TrainSettings) -> str:
    """Describe device, processes and dtype in one line."""
    device, options = accelerator.device, settings.compute
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    tf32 = " with products in TF32" if options.tf32 else ""
    kept = "adapter" if settings.denoiser.lora_rank else "weights"
    return f"device: {device.type} ({name}){processes}; dtype: {options.dtype}{tf32} ({kept} and optimizer: fp32)"


def _uses_cpu(device: Device | None) -> bool:
    """Whether to train on the CPU.

    Raises:
        UserError: torch sees no GPU, although the machine has one or a launcher started several processes, and the CPU
            was not asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: {no_gpu()}; see docs/guide/deploy.md, or use --device cpu")
    if device is not None or torch.accelerator.is_available():
        return device == "cpu"
    # `accelerate launch --cpu`, or CUDA_VISIBLE_DEVICES hides the GPUs on purpose.
    if parse_flag_from_env("ACCELERATE_USE_CPU") or gpus_are_hidden():
        return True
    refuse_silent_cpu()
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"a launcher started {processes} processes, but {no_gpu()}; see docs/guide/deploy.md, or use --device cpu"
        )
    return True


def _require_compiler() -> None:
    # Without a compiler, torch.compile fails at the first step, with pages of traceback.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError(
            "--compile needs a C compiler, but neither gcc nor clang nor $CC exists: install one, for example with "
            "`apt-get install g++`, or leave --compile out"
        )


def _require_whole_environment() -> None:
    """Refuse an environment with some variables of a launcher, but not all.

    Raises:
        UserError: WORLD_SIZE is set, but the rank or the address of the main process is not.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1":
        return
    missing = [] if any(name in os.environ for name in _RANKS) else ["RANK"]
    missing += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if missing:
        raise UserError(
            f"the environment has WORLD_SIZE={processes} but not {' and '.join(missing)}: unset WORLD_SIZE to train in "
            "one process, or start the processes with torchrun or accelerate launch"
        )


@contextmanager
def _announce_long_wait() -> Iterator[None]:
    """Print what the process waits for if the others do not connect soon."""
    processes = os.environ.get("WORLD_SIZE", "1")
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    text = (
        f"process {rank} of {processes} waits for the others at {where} (from WORLD_SIZE and MASTER_ADDR); unset "
        "WORLD_SIZE to train in one process\n"
    )
    timer = threading.Timer(_PATIENCE_SECONDS, sys.stderr.write, [text])
    if processes != "1":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
