"""Measure what channels_last and torch.compile gain in a forward pass of a denoiser, on one CPU core.

    python -m benchmarks.speed.forward [--batch 32] [--turns 20]

Runs the embedded world's denoiser and writes a section of docs/results/benchmarks.md. One or two minutes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from benchmarks.page import ROOT, stamp, write_section
from smpo_models.loading import load_family

MODEL = ROOT / "pipeline/smpo_pipeline/toy/assets/model"


def cpu_seconds(forward: Callable[[], torch.Tensor]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    forward()
    return time.process_time() - start


def forward_of(denoiser: nn.Module, batch: int) -> Callable[[], torch.Tensor]:
    """Return a function that runs the denoiser on fixed random latents of 16 x 16."""
    stream = torch.Generator().manual_seed(0)
    config = denoiser.config
    states = torch.randn(batch, config.in_channels, 16, 16, generator=stream)
    text = torch.randn(batch, 77, config.cross_attention_dim, generator=stream)
    return lambda: denoiser(states, torch.tensor(500), text).sample


@torch.no_grad()
def main() -> None:
    """Measure the variants in turn, and write the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    plain, channels_last, to_compile = (load_family(MODEL).denoiser.eval() for _ in range(3))
    channels_last.to(memory_format=torch.channels_last)
    to_compile.compile()
    forwards = {
        "as it is": forward_of(plain, arguments.batch),
        "channels_last": forward_of(channels_last, arguments.batch),
        "torch.compile": forward_of(to_compile, arguments.batch),
    }
    first = {}
    for name, forward in forwards.items():
        start = time.perf_counter()
        output = forward()
        first[name] = time.perf_counter() - start, output
    seconds = [{name: cpu_seconds(forward) for name, forward in forwards.items()} for _ in range(arguments.turns)]
    expected = first["as it is"][1]
    command = f"python -m benchmarks.speed.forward --batch {arguments.batch} --turns {arguments.turns}"
    lines = [
        stamp(command, ["torch", "diffusers"], cores=1),
        "",
        f"The embedded world's denoiser on {arguments.batch} images in float32. CPU time of the three variants in",
        f"turn: medians of {arguments.turns} turns, and ratios within a turn (lowest .. highest). The first call,",
        "which compiles with an empty cache, is wall-clock time.",
        "",
        "| forward | ms | as it is / this | first call, s | largest difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (once, output) in first.items():
        ratios = sorted(turn["as it is"] / turn[name] for turn in seconds)
        ratio = f"{median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f})"
        apart = float((output - expected).abs().max())
        ms = 1000 * median(turn[name] for turn in seconds)
        lines.append(f"| {name} | {ms:.0f} | {ratio} | {once:.1f} | {apart:.0e} |")
    print("\n".join(lines))
    write_section("Memory format and torch.compile", "\n".join(lines))


if __name__ == "__main__":
    main()
