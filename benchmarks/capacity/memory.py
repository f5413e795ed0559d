"""Account for the memory of training published models, and check it; writes docs/results/memory.md.

Three numbers for each run:

- account: `smpo-pipeline plan` computes it from configs, by what autograd saves in one forward on fake tensors;
- tracker: torch's own memory tracker over a whole step on fake tensors (`tracked_memory.py`), optimizer included;
- for two runs also measured: a real random SD 1.5 UNet in `smpo-train` on the CPU, by the allocator's events.

    python -m benchmarks.capacity.memory [--models sd15 sdxl ...] [--measure]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.profiler import ProfilerActivity, profile

from benchmarks.capacity.tracked_memory import tracked_step
from benchmarks.page import RESULTS, ROOT, stamp, write_page
from benchmarks.speed import train
from benchmarks.speed.shapes import make_model
from smpo_models.loading import load_family
from smpo_models.memory_account.inversion import InversionRun, account_inversion
from smpo_models.memory_account.training import TrainingRun, account_training
from smpo_trainer.cli import app
from smpo_trainer.train_loop import TrainLoop

CONFIGS = ROOT / "benchmarks/published_configs"
MODELS = {
    "sd15": "SD 1.5",
    "sdxl": "SDXL",
    "sd35-medium": "SD3.5-Medium",
    "sd35-large": "SD3.5-Large",
    "flux1-dev": "FLUX.1-dev",
    "qwen-image": "Qwen-Image",
}
SIDES = (512, 1024)
RUNS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"lora_rank": 16},
    "LoRA, checkpointing": {"lora_rank": 16, "gradient_checkpointing": True},
    "LoRA, nf4, checkpointing": {"lora_rank": 16, "quantize": "nf4", "gradient_checkpointing": True},
}
MEASURED = {
    "all weights": TrainingRun(256, 256, batch_size=1, dtype="fp32", gpu=False),
    "LoRA": TrainingRun(512, 512, batch_size=1, dtype="fp32", gpu=False, lora_rank=16),
}
LIMITS = {"flux1-dev": 24, "qwen-image": 48}
PARTS = ("weights", "optimizer", "gradients", "activations", "total", "tracker")
GB = 1e9


def account(cell: tuple[str, int, str]) -> dict[str, Any]:
    """Account for one model, side and kind of run, and track it."""
    model, side, name = cell
    family = load_family(str(CONFIGS / model), ())
    run = TrainingRun(side, side, batch_size=1, **RUNS[name])
    memory = account_training(family, run)
    parts = {"weights": memory.weights, "optimizer": memory.optimizer, "gradients": memory.gradients}
    parts |= {"activations": memory.activations, "total": memory.total, "checkpoint": memory.checkpoint}
    found = parts | {"model": model, "side": side, "run": name, "tracker": tracked_step(family, run)}
    print(json.dumps(found), flush=True)
    return found


def invert(model: str) -> dict[str, int]:
    """Account for an inversion of one trajectory, and of the default batch."""
    peaks = {}
    for trajectories in (1, 16):
        family = load_family(str(CONFIGS / model), ("text", "vae"), device="meta")
        side = family.resolution()
        run = InversionRun(side, side, batch_size=trajectories, holds_text=not family.stores_text)
        peaks[str(trajectories)] = account_inversion(family, run).total
    return peaks


def measure(run: TrainingRun) -> int:
    """Return the most bytes that the CPU's allocator has given out at once, in two steps of a real run of SD 1.5."""
    train.SIDE = run.height // 8
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", "sd15", 1, train.SIDE)
        train.make_shards(work / "shards", work / "model", trajectories=2, text=True)
        flags = ["--max-steps", "2", "--batch-size", "1", "--device", "cpu", "--dtype", "fp32", "--workers", "0"]
        flags += ["--reference", "stored"]  # or it is recomputed for all 18 states
        flags += ["--lora-rank", str(run.lora_rank)] if run.lora_rank else []
        places = ["--shards", str(work / "shards"), "--model", str(work / "model"), "--out", str(work / "out")]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, _without_saving():
            try:
                app([*places, *flags, "--reward", "taste", "--lr", "1e-8"], standalone_mode=False)
            except SystemExit as stopped:
                print("ended", stopped.code)
        events = recorded.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _without_saving() -> AbstractContextManager[object]:
    """End the run before its checkpoint, which needs 10 GB of disk."""

    def leave(*_args: object) -> None:
        raise SystemExit(0)

    return patch.object(TrainLoop, "_save", leave)


# The page

_ABOUT = """\
GB (10^9 bytes) of GPU memory at the peak of a training step of one state (two images): bf16, AdamW, adapters of rank
16, text stored in the shards; neither reference, VAE nor text encoder is in memory. `account` is what `smpo-pipeline
plan --gpu-memory` prints; `tracker` is torch's `MemTracker` over a whole step on fake tensors, checkpointing and the
optimizer included. **No GPU was used.** Both follow a GPU's rules of autocast, and assume a fused attention, which
saves queries, keys, values, output and one number a row, and no matrix of all pairs of tokens. Prompts have the
greatest length. Not included: CUDA's context and libraries (about 0.5 GB), kernels' workspaces, and what the allocator
cannot use. A GPU of 24 GB has 24 GiB, 25.8 GB."""

_REAL = """\
A random UNet of SD 1.5 (0.86 billion weights) in `smpo-train` on the CPU: two steps of one state, float32; the peak by
the events of torch's CPU allocator, from the program's start."""


def lines_of(
    cells: list[dict[str, Any]], inversions: dict[str, dict[str, int]], measured: dict[str, int]
) -> Iterator[str]:
    """The page's text."""
    ratios = [cell["total"] / cell["tracker"] for cell in cells]
    yield _ABOUT
    yield ""
    yield f"Account over tracker: {min(ratios):.3f} .. {max(ratios):.3f} in {len(ratios)} runs."
    for side in SIDES:
        yield ""
        yield f"## {side} pixels"
        yield ""
        yield "| model | run | weights | optimizer | gradients | activations | account | tracker | ratio |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for cell in (cell for cell in cells if cell["side"] == side):
            numbers = (
                cell[part] / GB for part in ("weights", "optimizer", "gradients", "activations", "total", "tracker")
            )
            row = " | ".join(f"{number:.2f}" for number in numbers)
            yield f"| {MODELS[cell['model']]} | {cell['run']} | {row} | {cell['total'] / cell['tracker']:.3f} |"
    yield ""
    yield "## What fits"
    yield ""
    yield f"A LoRA below 4-bit weights with checkpointing, at {SIDES[-1]} pixels:"
    yield ""
    for cell in cells:
        limit = LIMITS.get(cell["model"])
        if limit and (cell["side"], cell["run"]) == (SIDES[-1], "LoRA, nf4, checkpointing"):
            says = "fits" if cell["total"] < limit * GB else "does not fit"
            yield f"- {MODELS[cell['model']]}: {cell['total'] / GB:.1f} GB, which {says} in {limit} GB"
    yield ""
    yield "## Inversion, at the model's own size"
    yield ""
    yield "With text encoders where `--text live` is the default; else their own stage, where it needs more."
    yield ""
    yield "| model | 1 trajectory | 16 trajectories |"
    yield "|---|---|---|"
    for model, peaks in inversions.items():
        yield f"| {MODELS[model]} | {peaks['1'] / GB:.1f} | {peaks['16'] / GB:.1f} |"
    yield ""
    yield "## Against a real run"
    yield ""
    yield _REAL
    yield ""
    yield "| run | account | measured | ratio |"
    yield "|---|---|---|---|"
    for name, peak in measured.items():
        run = MEASURED[name]
        total = account_training(load_family(str(CONFIGS / "sd15"), ()), run).total
        yield f"| {name}, {run.height} pixels | {total / GB:.2f} | {peak / GB:.2f} | {total / peak:.3f} |"


def main() -> None:
    """Account for all runs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--measure", action="store_true", help="Also train a real SD 1.5 for two steps: 17 GB of memory."
    )
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    measured = {}
    if arguments.measure:
        fresh = multiprocessing.get_context("spawn")
        for name, run in MEASURED.items():
            with fresh.Pool(1) as pool:
                measured[name] = pool.apply(measure, (run,))
    cells = [(model, side, name) for model in arguments.models for side in SIDES for name in RUNS]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        found = pool.map(account, cells, chunksize=1)
        inversions = dict(zip(arguments.models, pool.map(invert, arguments.models, chunksize=1), strict=True))
    command = " ".join(["python -m benchmarks.capacity.memory", *sys.argv[1:]])
    libraries = ("torch", "diffusers", "transformers", "peft")
    text = "\n".join([stamp(command, libraries), "", *lines_of(found, inversions, measured)])
    write_page(RESULTS / "memory.md", "GPU memory", text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
