"""Measure the device's peak rates, and compute the time of an eager forward pass at those rates."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import World

Rates = dict[str, float]
"""Bytes per second of ``copy``; operations per second by kind (``mm``, ``convolution``, ``attention``) and dtype."""


def measure_ceilings(world: World, report: Report) -> None:
    """Measure copies, matrix products, convolutions and attention, SHA-256 and the disk."""
    device, large = world.device, world.size.matrix
    rates: Rates = {"copy": _copy_rate(world)}
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.randn(large, large, device=device.name).to(dtype)
        rates[f"mm {_short(dtype)}"] = 2 * large**3 / device.seconds(lambda left=left: left @ left)
        rates[f"attention {_short(dtype)}"] = _attention_rate(world, 64, dtype)
        rates[f"convolution {_short(dtype)}"] = _convolution_rate(world, 640, dtype, torch.contiguous_format)
    report.note(**{name: f"{rate / 1e12:.4g} T/s" for name, rate in rates.items()})
    with device.tf32():
        for channels in (320, 640):
            for layout, kind in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
                rate = _convolution_rate(world, channels, torch.float32, kind)
                report.note(**{f"convolution {channels} tf32 {layout}": f"{rate / 1e12:.4g} T/s"})
        rates["convolution tf32"] = _convolution_rate(world, 640, torch.float32, torch.contiguous_format)
    for channels in (320, 640):
        for dtype in (torch.bfloat16, torch.float32):
            rate = _convolution_rate(world, channels, dtype, torch.channels_last)
            report.note(**{f"convolution {channels} {_short(dtype)} NHWC": f"{rate / 1e12:.4g} T/s"})
    rate = _attention_rate(world, 40, torch.bfloat16)
    report.note(**{"attention 40 half": f"{rate / 1e12:.4g} T/s"})
    rate = _attention_rate(world, 64, torch.bfloat16, backward=True)
    report.note(**{"attention 64 half, forward and backward": f"{rate / 1e12:.4g} T/s"})
    _host(world, report)
    world.notes["rates"] = rates


def _copy_rate(world: World) -> float:
    """Bytes read and written per second."""
    size = world.size.matrix**2 * 4
    source = torch.zeros(size, dtype=torch.uint8, device=world.device.name)
    target = torch.empty_like(source)
    return 2 * size / world.device.seconds(lambda: target.copy_(source))


def _convolution_rate(world: World, channels: int, dtype: torch.dtype, layout: torch.memory_format) -> float:
    """Operations per second of the UNet's most common convolution, at 32 rows."""
    width, side = channels // world.size.divide, world.size.side["sd15"] * 320 // channels
    make = {"device": world.device.name, "dtype": dtype}
    x = torch.randn(32 if world.size.divide == 1 else 1, width, side, side, **make).to(memory_format=layout)
    weight = torch.randn(width, width, 3, 3, **make).to(memory_format=layout)
    operations = 2 * 9 * width * x.numel()
    return operations / world.device.seconds(lambda: functional.conv2d(x, weight, padding=1))


def _attention_rate(world: World, head: int, dtype: torch.dtype, *, backward: bool = False) -> float:
    """Operations per second of self-attention over the UNet's largest feature map."""
    batch, length = (32, world.size.side["sd15"] ** 2) if world.size.divide == 1 else (1, 16)
    shape = (batch, 8, length, head)
    query, key, value = (
        torch.randn(shape, device=world.device.name, dtype=dtype, requires_grad=backward) for _ in range(3)
    )

    def work() -> torch.Tensor:
        made = functional.scaled_dot_product_attention(query, key, value)
        if backward:
            made.sum().backward()
        return made

    # Attention has two products in the forward pass and five in the backward pass, as usually counted.
    operations = 2 * batch * 8 * length**2 * head * (7 if backward else 2)
    return operations / world.device.seconds(work)


def _host(world: World, report: Report) -> None:
    """Measure SHA-256 and the disk."""
    content = os.urandom(1 << 20) * (256 if world.size.divide == 1 else 4)
    began = time.perf_counter()
    hashlib.sha256(content)
    hashed = time.perf_counter()
    with (world.work / "disk").open("wb") as file:
        for _ in range(4):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    (world.work / "disk").unlink()
    report.note(
        SHA256=f"{len(content) / 1e9 / (hashed - began):.3g} GB/s",
        disk=f"{4 * len(content) / 1e9 / (written - hashed):.3g} GB/s",
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "half", torch.float16: "half", torch.float64: "float64"}.get(dtype, "float32")


class Roofline(TorchDispatchMode):
    """Sum, over the operators that run inside, the larger of compute time and memory time at the device's rates.

    Views cost nothing; kernel launches and gaps between kernels are not counted.

    Attributes:
        seconds: the sum.
    """

    def __init__(self, rates: Rates, *, tf32: bool = False) -> None:
        super().__init__()
        self._rates, self._tf32 = rates, tf32
        self.seconds = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:  # noqa: ANN401
        """Run the operator and add its time."""
        made = function(*arguments, **(more or {}))
        if any(each.alias_info and not each.alias_info.is_write for each in function._schema.returns):  # noqa: SLF001
            return made
        tensors = [each for each in tree_leaves((arguments, more, made)) if isinstance(each, torch.Tensor)]
        if not tensors:
            return made
        seconds = sum(each.nbytes for each in tensors) / self._rates["copy"]
        count = flop_registry.get(function.overloadpacket)
        if count:
            operations = count(*arguments, **(more or {}), out_val=made)
            seconds = max(seconds, operations / self._rate(function, tensors[0].dtype))
        self.seconds += seconds
        return made

    def _rate(self, function: Any, dtype: torch.dtype) -> float:  # noqa: ANN401
        name = function.overloadpacket.__name__
        kind = "convolution" if "conv" in name else "attention" if "attention" in name else "mm"
        arithmetic = "tf32" if self._tf32 and kind == "convolution" else _short(dtype)
        return self._rates.get(f"{kind} {arithmetic}") or self._rates[f"{kind} float32"]


def roofline(world: World, work: Callable[[], object], *, tf32: bool = False) -> float | None:
    """Seconds of ``work`` at the device's rates, one kernel after another; None if the rates were not measured."""
    if "rates" not in world.notes:
        return None
    with torch.no_grad(), Roofline(world.notes["rates"], tf32=tf32) as counted:
        work()
    return counted.seconds


def operations(work: Callable[[], object]) -> int:
    """Floating point operations of ``work`` in matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
