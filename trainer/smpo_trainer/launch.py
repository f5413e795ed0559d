"""The device and the processes of a run: what flags and launcher ask for, held against what is there."""

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
from smpo_schemas.dtypes import Dtype
from smpo_trainer.model.fsdp import fsdp_plugin
from smpo_trainer.output.run_folder import dtype_of_run
from smpo_trainer.settings import ComputeOptions, Device, TrainSettings

_TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others. They wait for what one does alone (loading over a slow network, encoding all
prompts, drawing, writing checkpoints); NCCL's own 10 minutes would end the run."""

_PATIENCE_SECONDS = 10.0
"""After which a process says that it waits for the others to start."""

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""A process's number, by the launchers that accelerate knows."""


def choose_dtype(settings: TrainSettings) -> TrainSettings:
    """The same settings with a dtype: the flag's, or that of the run that is continued, or what the launcher says.

    Where none of these says one, it is what suits the device. A run is continued in its own dtype whatever the launcher
    says: `accelerate launch` says fp32 where it was not configured.

    Raises:
        UserError: accelerate is configured for a precision that is not supported.
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
    """Join the processes of the run, each on its device.

    Args:
        settings: with a dtype, as :func:`choose_dtype` returns them.

    Raises:
        UserError: the device, or a setting that needs another one, is not to be had; or a launcher's environment is
            incomplete.
    """
    fsdp = fsdp_plugin(settings)
    _require_whole_environment()
    # Not told, it lets the processes of torchrun train each by itself where there is no GPU.
    compute = settings.compute
    on_cpu = _uses_cpu(compute.device)
    if compute.compile:
        _require_compiler()
    try:
        with _patience():
            accelerator = Accelerator(
                cpu=on_cpu,
                mixed_precision="no" if compute.dtype == "fp32" else compute.dtype,
                fsdp_plugin=fsdp,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
                # Not told, it takes a number from the environment and divides every loss by it.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )
    except ValueError as error:  # a device that lacks this dtype
        raise UserError(f"--dtype {compute.dtype}: {error}") from error
    if fsdp and not accelerator.is_fsdp2:
        raise UserError("accelerate is configured for FSDP, which needs several processes, each with a GPU of its own")
    # Accelerate would train in float32 without a word.
    if compute.dtype == "fp16" and accelerator.device.type != "cuda":
        raise UserError(f"--dtype fp16 needs a GPU, the device is {accelerator.device}; use bf16 or fp32")
    if compute.tf32:
        if accelerator.device.type != "cuda":
            raise UserError(f"--tf32 needs an NVIDIA GPU, the device is {accelerator.device}; leave it out")
        torch.set_float32_matmul_precision("high")
    # Float32 is float32, as in the jobs that made the reference: by default cuDNN convolves in TF32.
    torch.backends.cudnn.allow_tf32 = compute.tf32
    return accelerator


def describe(accelerator: Accelerator, options: ComputeOptions) -> str:
    """One line for the user: device, processes and dtype."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    tf32 = " with products in TF32" if options.tf32 else ""
    return f"device: {device.type} ({name}){processes}; dtype: {options.dtype}{tf32} (weights and optimizer: fp32)"


def _uses_cpu(device: Device | None) -> bool:
    """Whether to train on the CPU.

    Raises:
        UserError: nobody asked for it, but there is no other choice, although a GPU or a launcher speaks for another.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: {no_gpu()}; see docs/guide/deploy.md, or use --device cpu")
    if device is not None or torch.accelerator.is_available():
        return device == "cpu"
    # `accelerate launch --cpu`, or GPUs that are hidden on purpose.
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
    """Raise UserError where torch.compile would fail at the first step, with a page of its own, for want of one."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError(
            "--compile needs a C compiler, and there is none (gcc, clang, or what CC names): install one, as by "
            "`apt-get install g++`, or leave --compile out"
        )


def _require_whole_environment() -> None:
    """Raise UserError where a variable of a launcher is set, but not those that come with it."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1":
        return
    lacking = [] if any(name in os.environ for name in _RANKS) else ["RANK"]
    lacking += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if lacking:
        raise UserError(
            f"WORLD_SIZE={processes} is set in the environment, {' and '.join(lacking)} not: no launcher started this "
            "process; unset WORLD_SIZE, or start it with torchrun or accelerate launch"
        )


@contextmanager
def _patience() -> Iterator[None]:
    """Say what is waited for, where the other processes do not come."""
    processes = os.environ.get("WORLD_SIZE", "1")
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    text = (
        f"process {rank} of {processes} waits for the others at {where}, as WORLD_SIZE and MASTER_ADDR say; unset "
        "WORLD_SIZE to train in one process\n"
    )
    timer = threading.Timer(_PATIENCE_SECONDS, sys.stderr.write, [text])
    if processes != "1":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
