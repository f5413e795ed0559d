"""Use of the device: peak memory, and model FLOPs utilization (MFU, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smpo_models.family import Conditioning
from smpo_models.tuned.lora import add_lora
from smpo_trainer.data.loader import StateBatch
from smpo_trainer.model.fsdp import unsharded_class
from smpo_trainer.model.policy import Policy

_ARITHMETIC = ("half", "tf32", "fp32")
_A100, _H100, _NVL = (312, 156, 19.5), (989, 495, 67), (835.5, 417.5, 60)
_PEAKS = {
    "NVIDIA A10": (125, 62.5, 31.2),
    "NVIDIA A10G": (70, 35, 35),
    "NVIDIA A40": (149.7, 74.8, 37.4),
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A800-SXM4-80GB": _A100,
    "NVIDIA A800 80GB PCIe": _A100,
    "NVIDIA B200": (2250, 1125, 75),
    "NVIDIA GH200 480GB": _H100,
    "NVIDIA H20": (148, 74, 44),
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 NVL": _NVL,
    "NVIDIA H100 PCIe": (756, 378, 51),
    "NVIDIA H200": _H100,
    "NVIDIA H200 NVL": _NVL,
    "NVIDIA H800": _H100,
    "NVIDIA L4": (121, 60.5, 30.3),
    "NVIDIA L40": (181, 90.5, 90.5),
    "NVIDIA L40S": (362, 183, 91.6),
    "NVIDIA RTX A6000": (154.8, 77.4, 38.7),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 182.1, 91.1),
    "NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8, 104.8),
}
"""Dense TFLOP/s in half precision (with float32 accumulation), TF32 and float32 by device name, from data sheets."""


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: tensors on a GPU, resident pages on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Utilization:
    """Compares the operations per second of forward and backward passes with the device's peak.

    Counts the matrix products of the denoiser, once each: gradient checkpointing does not add to them.
    """

    def __init__(self, policy: Policy, peak: float) -> None:
        """Count for a device with a peak of ``peak`` operations per second."""
        self._policy, self._peak = policy, peak
        self._operations_per_row: dict[tuple[int, ...], int] = {}  # by latent shape
        self._operations = 0
        self._is_countable = True

    @classmethod
    def on_device(cls, policy: Policy, accelerator: Accelerator) -> Utilization | None:
        """Count for the accelerator's device; None if its peak is unknown."""
        if accelerator.device.type != "cuda":
            return None
        half = accelerator.mixed_precision in {"fp16", "bf16"}
        arithmetic = "half" if half else "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
        peaks = _PEAKS.get(torch.cuda.get_device_name(accelerator.device))
        return cls(policy, 1e12 * peaks[_ARITHMETIC.index(arithmetic)]) if peaks else None

    def add(self, batch: StateBatch, conditioning: Conditioning) -> None:
        """Add the operations of a micro-batch."""
        shape = tuple(batch.x0_B2Chw.shape[2:])
        if shape not in self._operations_per_row:
            try:
                self._operations_per_row[shape] = operations(self._policy, shape, conditioning[:1])
            except RuntimeError:
                # The denoiser's forward reads values, such as the lengths of texts; on the meta device there are none.
                self._operations_per_row[shape], self._is_countable = 0, False
        self._operations += self._operations_per_row[shape] * 2 * len(batch.pair_ids)

    def share(self, seconds: float) -> float | None:
        """Return the utilization over the last ``seconds``, and reset the count; None if it cannot be counted."""
        count, self._operations = self._operations, 0
        return count / (seconds * self._peak) if self._is_countable else None


def operations(policy: Policy, latent: tuple[int, ...], conditioning: Conditioning) -> int:
    """Count the floating point operations of a forward and backward of one row, without computing them.

    Args:
        policy: has the denoiser.
        latent: shape (C, h, w) of the latent.
        conditioning: conditioning of one row.
    """
    meta = torch.device("meta")
    # Initialising a model draws random numbers: restore the generator, or MFU would change a run.
    with torch.random.fork_rng([]), meta:
        denoiser: nn.Module = unsharded_class(policy.denoiser).from_config(policy.denoiser.config)
        denoiser.eval().requires_grad_(policy.lora_rank is None)
        if policy.lora_rank:
            add_lora(denoiser, policy.family.lora_targets, policy.lora_rank, idle=policy.family.idle_layers)
    added = {name: value.to(meta) for name, value in conditioning.added.items()}
    meta_conditioning = replace(conditioning, text_BLD=conditioning.text_BLD.to(meta), added=added)
    x_1Chw, t_1 = torch.zeros(1, *latent, device=meta), torch.zeros(1, dtype=torch.int64, device=meta)
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        policy.family.denoise(denoiser, x_1Chw, t_1, meta_conditioning).sum().backward()
    return counter.get_total_flops()
