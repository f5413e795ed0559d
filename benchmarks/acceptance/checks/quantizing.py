"""``--quantize``: 4 and 8 bit weights of SDXL on the device, where bitsandbytes has kernels of its own."""

from __future__ import annotations

import math
import shutil
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from torch import nn

from benchmarks.acceptance.checks.training import train
from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import GIB, World, known_fingerprints
from smpo_models.loading import load_family
from smpo_trainer.model.quantization import _config, quantize

_METHODS = ("nf4", "int8")


def check_quantization(world: World, report: Report) -> None:
    """Train an adapter above quantized weights, which are to be those of diffusers' own loading."""
    if find_spec("bitsandbytes") is None:
        report.note(bitsandbytes="not installed")
        for method in _METHODS:
            report.judge(f"{method}: first loss over ln 2", None, least=0.999, most=1.001)
        return
    for method in _METHODS:
        out = world.work / f"quantized-{method}"
        flags = ["--batch-size", 1, "--lora-rank", 16, "--quantize", method, "--gradient-checkpointing"]
        with known_fingerprints():
            records, _ = train(world, "sdxl", out, *flags, "--max-steps", 3)
        report.judge(f"{method}: first loss over ln 2", records[0]["loss"] / math.log(2), least=0.999, most=1.001)
        report.judge(f"{method}: steps with a loss", sum(each["loss"] is not None for each in records), least=3)
        report.note(
            **{
                f"{method}: memory, GiB": records[-1]["memory_gib"],
                f"{method}: pairs/s": records[-1]["states_per_second"],
                f"{method}: reference noise": records[0]["reference_noise/std"],
            }
        )
        shutil.rmtree(out)
        report.judge(f"{method}: weights unlike diffusers'", _unlike(world, report, method), most=0)
        world.device.clean()


def _unlike(world: World, report: Report, method: Any) -> int:  # noqa: ANN401
    """Count the tensors of quantized layers that differ from those of ``from_pretrained``."""
    device, dtype = torch.device(world.device.name), torch.bfloat16
    family = load_family(str(world.model("sdxl")), ("denoiser",), denoiser_dtype=dtype)
    denoiser: Any = family.denoiser
    names = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    world.device.clean()
    quantize(denoiser, method, dtype, device)
    report.note(**{f"{method}: quantized UNet, GiB": world.device.peak() / GIB})
    # diffusers refuses CPUs, on which a test runs this.
    with (
        patch.object(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None),
        patch.object(BnB8BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None),
    ):
        stock = type(denoiser).from_pretrained(
            world.model("sdxl") / "unet",
            quantization_config=_config(method, dtype),
            torch_dtype=dtype,
            device_map={"": world.device.name},
        )
    pairs = [(denoiser.get_submodule(name).weight, stock.get_submodule(name).weight) for name in names]
    return sum(type(ours) is not type(theirs) or not torch.equal(ours.data, theirs.data) for ours, theirs in pairs)
