"""Track a whole training step on fake tensors, with torch's own memory tracker: an oracle for the memory account.

The step runs: forward, torch's checkpointing, backward, gradient clipping, the real optimizer. It shares with the
account the denoiser on fake tensors and the GPU's rules of autocast, and nothing of how memory is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint
from transformers.optimization import Adafactor

from smpo_models.family import Family
from smpo_models.memory_account.fake import GpuAutocast, Inputs, fake_arithmetic, make_fake
from smpo_models.memory_account.training import TrainingRun, mean_error, prepare_denoiser
from smpo_models.weights import DTYPES


class _Tracker(MemTracker):
    """torch's tracker without its statistics of modules, for which it goes through all of them at each operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:  # noqa: ANN401, ARG002
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:  # noqa: ARG002
        # Hooks only tell gradients from activations; on frozen weights they fail.
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def tracked_step(family: Family, run: TrainingRun) -> int:
    """Return the most bytes at once in a step that is not the first: the optimizer's state is there from its start."""
    denoiser, _ = prepare_denoiser(family, run)
    if run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing(_checkpoint if run.gpu else None)
    with fake_arithmetic(gpu=run.gpu):
        make_fake(denoiser)
        trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        optimizer = _optimizer(run, trained)
        tracker = _Tracker()
        tracker.track_external(denoiser)
        with tracker:
            inputs = Inputs.make(family, run.height, run.width, 2 * run.batch_size)
            averages = [parameter.detach().clone() for parameter in trained] if run.averages else []
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            _update(optimizer, trained)
            for _ in range(2 if run.accumulates else 1):
                loss = mean_error(family, denoiser, inputs, DTYPES[run.dtype])
                torch.autograd.backward(loss)
                tracker.reset_mod_stats()
                del loss
            _update(optimizer, trained)
        del averages
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def _update(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _optimizer(run: TrainingRun, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    if run.optimizer == "adafactor":
        return Adafactor(trained, lr=1e-5, scale_parameter=False, relative_step=False, warmup_init=False)
    return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401  (torch's signature)
    def as_on_gpu(*args: Any) -> Any:  # noqa: ANN401
        with GpuAutocast():  # in the recomputation, which starts inside torch's own backward, too
            return function(*args)

    return checkpoint(as_on_gpu, *args, use_reentrant=False)
