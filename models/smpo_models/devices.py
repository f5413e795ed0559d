"""The device to compute on: what is asked for, held against what torch can use here."""

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
    """``cuda`` or ``cpu``: the given one, or else a GPU where torch sees one.

    Raises:
        UserError: neither, or one that is not to be had; or nobody asked for the CPU of a machine with a GPU.
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
    """The dtype of a diffusion model where none is asked for: bf16 on GPUs, but for those that emulate it.

    Args:
        device: ``cpu`` or ``cuda``; a cluster's GPUs, where this machine has none, count as having bf16.
    """
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp32" if device == "cpu" or emulated else "bf16"


def reward_arithmetic(device: str, dtype: str) -> AbstractContextManager[object]:
    """Compute a reward's matrix products in ``dtype``, by autocast: weights and sensitive operations stay in float32.

    Rewards that are vision-language models load their weights in it.
    """
    return nullcontext() if dtype == "fp32" else torch.autocast(device, DTYPES[dtype])


def refuse_silent_cpu() -> None:
    """Refuse the CPU that nobody asked for where there is a GPU: hours would go by before anybody wonders.

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
    """What torch was built for, where it sees no GPU."""
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    return f"torch {torch.__version__} ({build}) sees no GPU"


def device_in_words(device: str) -> str:
    """A device by its maker's name, or with its cores."""
    name = torch.cuda.get_device_name(device) if device == "cuda" else f"{os.cpu_count()} cores"
    return f"{device} ({name})"
