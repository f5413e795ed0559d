"""Choose the device to compute on: what the user asked for, checked against what torch can use here."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from smpo_common.errors import UserError
from smpo_models.weights import DTYPES
from smpo_schemas.choices import Dtype

_DEVICES = Path("/dev")


def choose_device(given: str | None) -> str:
    """Return ``cuda`` or ``cpu``: the given device, or by default a GPU if torch sees one.

    Raises:
        UserError: the device has another name or torch cannot use it; or none is given on a machine with a GPU that
            torch does not see.
    """
    if given not in (None, "cpu", "cuda"):
        raise UserError(f"--device {given}: cpu or cuda")
    if given == "cpu":
        return given
    if torch.cuda.is_available():
        return "cuda"
    if given == "cuda":
        raise UserError(f"--device cuda: {no_gpu()}; see docs/guide/deploy.md, or use --device cpu")
    refuse_silent_cpu()
    return "cpu"


def default_dtype(device: str) -> Dtype:
    """Return the default dtype of a diffusion model: bf16 on GPUs, fp32 on CPUs and on GPUs that only emulate bf16.

    Args:
        device: ``cpu`` or ``cuda``. If this machine has no GPU, those of the cluster are assumed to have bf16.
    """
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp32" if device == "cpu" or emulated else "bf16"


def reward_arithmetic(device: str, dtype: str) -> AbstractContextManager[object]:
    """Return a context in which autocast computes a reward's products in ``dtype``; the rest stays in float32.

    Rewards that are vision-language models also load their weights in ``dtype``.
    """
    return nullcontext() if dtype == "fp32" else torch.autocast(device, DTYPES[dtype])


def refuse_silent_cpu() -> None:
    """Refuse to fall back to the CPU on a machine with a GPU: the user might notice only hours later.

    Raises:
        UserError: the machine has an NVIDIA GPU that torch does not see, and that is not hidden on purpose.
    """
    gpu = None if gpus_are_hidden() else next(iter(sorted(_DEVICES.glob("nvidia[0-9]*"))), None)
    if gpu:
        raise UserError(
            f"this machine has an NVIDIA GPU ({gpu}), but {no_gpu()}; see docs/guide/deploy.md, or use --device cpu"
        )


def gpus_are_hidden() -> bool:
    """Whether the environment hides all GPUs from torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}


def no_gpu() -> str:
    """Say that torch sees no GPU, and what it was built for."""
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    return f"torch {torch.__version__} ({build}) sees no GPU"


def device_in_words(device: str) -> str:
    """Describe a device: a GPU by its product name, a CPU by its number of cores."""
    name = torch.cuda.get_device_name(device) if device == "cuda" else f"{os.cpu_count()} cores"
    return f"{device} ({name})"
