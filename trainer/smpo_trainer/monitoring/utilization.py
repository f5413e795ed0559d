"""What of a device a run uses: memory, and the share of its arithmetic (MFU, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smpo_models.family import Conditioning
from smpo_trainer.data.loader import StateBatch
from smpo_trainer.model.fsdp import plain_class
from smpo_trainer.model.policy import Policy, add_lora

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
"""TFLOP a second in half precision (summed in float32), TF32 and float32, without sparsity, by the device's own name;
from data sheets."""


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has had: on the GPU as tensors, on a CPU as resident pages."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Utilization:
    """Counts the operations of a step's forwards and backwards, as against what the device could have done.

    Only the denoiser's products of matrices count, each once: what gradient checkpointing computes again does not.
    """

    def __init__(self, policy: Policy, peak: float) -> None:
        """Of a denoiser on a device of ``peak`` operations a second."""
        self._policy, self._peak = policy, peak
        self._of_row: dict[tuple[int, ...], int] = {}
        self._operations = 0

    @classmethod
    def of(cls, policy: Policy, accelerator: Accelerator) -> Utilization | None:
        """None where the device's peak is not known."""
        if accelerator.device.type != "cuda":
            return None
        half = accelerator.mixed_precision in {"fp16", "bf16"}
        arithmetic = "half" if half else "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
        peaks = _PEAKS.get(torch.cuda.get_device_name(accelerator.device))
        return cls(policy, 1e12 * peaks[_ARITHMETIC.index(arithmetic)]) if peaks else None

    def add(self, batch: StateBatch, conditioning: Conditioning) -> None:
        """A micro-batch goes through."""
        shape = tuple(batch.x0_B2Chw.shape[2:])
        if shape not in self._of_row:
            self._of_row[shape] = operations(self._policy, shape, conditioning[:1])
        self._operations += self._of_row[shape] * 2 * len(batch.pair_ids)

    def share(self, seconds: float) -> float:
        """The share of what the device could have done in ``seconds`` that was done since this was last asked."""
        done, self._operations = self._operations, 0
        return done / (seconds * self._peak)


def operations(policy: Policy, latent: tuple[int, ...], conditioning: Conditioning) -> int:
    """Floating point operations of one forward and backward of one row, counted without computing them.

    Args:
        policy: its denoiser.
        latent: (C, h, w).
        conditioning: of one row.
    """
    meta = torch.device("meta")
    with torch.random.fork_rng([]), meta:
        denoiser: nn.Module = plain_class(policy.denoiser).from_config(policy.denoiser.config)
        denoiser.eval().requires_grad_(policy.lora_rank is None)
        if policy.lora_rank:
            add_lora(denoiser, policy.lora_rank)
    added = {name: value.to(meta) for name, value in conditioning.added.items()}
    told = replace(conditioning, text_BLD=conditioning.text_BLD.to(meta), added=added)
    x_1Chw, t_1 = torch.zeros(1, *latent, device=meta), torch.zeros(1, dtype=torch.int64, device=meta)
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        policy.family.denoise(denoiser, x_1Chw, t_1, told).sum().backward()
    return counter.get_total_flops()
