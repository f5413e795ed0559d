"""Optimizers and learning rate schedules by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import Adafactor

from smpo_common.errors import UserError
from smpo_trainer.model.quantization import import_bitsandbytes
from smpo_trainer.settings import OptimizerOptions

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""Our names to those of diffusers; all schedules start with the warm-up."""

_FUSED = ("cpu", "cuda")
"""Devices with a fused AdamW in torch."""

_EIGHT_BIT = ("cuda",)
"""Devices with 8-bit optimizers in bitsandbytes; elsewhere it fails at the first step."""

_EIGHT_BIT_FLAG = "--optimizer adamw8bit"


def require_optimizer(options: OptimizerOptions, device: torch.device) -> None:
    """Check that the optimizer of ``--optimizer`` can be made, before a model is loaded.

    Raises:
        UserError: its package is not installed, or the device does not support it.
    """
    if options.optimizer == "adamw8bit":
        if device.type not in _EIGHT_BIT:
            raise UserError(f"--optimizer adamw8bit needs a GPU, the device is {device.type}; use adamw or adafactor")
        import_bitsandbytes(_EIGHT_BIT_FLAG)


def make_optimizer(
    options: OptimizerOptions, parameters: Sequence[nn.Parameter], peak_lr: float
) -> torch.optim.Optimizer:
    """Make the optimizer of ``--optimizer`` for the trained weights."""
    device = parameters[0].device.type
    common = {"lr": peak_lr, "weight_decay": options.weight_decay}
    if options.optimizer == "adafactor":
        # As in the published SDXL runs: an external learning rate instead of one relative to step and weights.
        return Adafactor(list(parameters), **common, scale_parameter=False, relative_step=False, warmup_init=False)
    if options.optimizer == "adamw8bit":
        return import_bitsandbytes(_EIGHT_BIT_FLAG).optim.AdamW8bit(list(parameters), **common)
    return torch.optim.AdamW(parameters, **common, fused=device in _FUSED)


def make_schedule(options: OptimizerOptions, optimizer: torch.optim.Optimizer, max_steps: int) -> LRScheduler:
    """Make the learning rate schedule of ``--lr-schedule``, with warm-up."""
    return get_scheduler(
        _SCHEDULES[options.lr_schedule],
        optimizer,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=max_steps,
    )
