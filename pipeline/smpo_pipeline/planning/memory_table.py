"""Print the memory account."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from smpo_pipeline.planning.memory import GB, MemoryPlan
from smpo_pipeline.terminal import format_bytes

_PARTS = {
    "weights": "denoiser",
    "vae": "VAE",
    "text_encoders": "text encoders",
    "optimizer": "optimizer's state, moving average",
    "gradients": "gradients",
    "activations": "activations",
    "encoding": "while images are encoded",
    "denoising": "while the denoiser runs",
    "stored_text_encoders": "text encoders, alone, before",
}
"""Rows by the names of the account's parts."""


def show_memory(console: Console, memory: MemoryPlan) -> None:
    """Print the account as a table, and what it says of the GPU and of the disk."""
    side = memory.resolution
    table = Table(title=f"GPU memory, {side} x {side} pixels, {memory.dtype}")
    trajectories = "1 trajectory" if memory.trajectories == 1 else f"{memory.trajectories} trajectories"
    states = "1 state" if memory.states == 1 else f"{memory.states} states"
    table.add_column("")
    for column in (f"invert, {trajectories}", f"smpo-train, {states}"):
        table.add_column(column, justify="right")
    for name, row in _PARTS.items():
        cells = [_cell(memory.invert.get(name)), _cell(memory.train.get(name))]
        if any(cells):
            table.add_row(row, *cells)
    table.add_section()
    table.add_row("at the peak", format_bytes(memory.invert_total), format_bytes(memory.train_total))
    console.print(table)
    train = memory.train
    counted = "Counted from configs, with prompts of the greatest length. Not included: CUDA's context and libraries"
    disk, result = format_bytes(train["checkpoint"]), format_bytes(train["result"])
    lines = [
        f"{counted} (about 0.5 GB), and what the allocator cannot use. A GPU of 24 GB has 24 GiB, 25.8 GB.",
        f"smpo-train trains {train['trained']:,} weights; a checkpoint takes {disk} of disk, the result {result}.",
    ]
    if memory.gpu_memory is not None:
        lines += _verdicts(memory, memory.gpu_memory)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _cell(count: int | None) -> str:
    return format_bytes(count) if count else ""


def _verdicts(memory: MemoryPlan, available: float) -> list[str]:
    lines = []
    for command, total in (("invert", memory.invert_total), ("smpo-train", memory.train_total)):
        says = "fits" if memory.fits(total) else "does not fit"
        lines.append(f"{command} {says} in {available / GB:g} GB: {format_bytes(total)}")
    if not memory.fits(memory.invert_total) and memory.trajectories > 1:
        lines[0] += "; try a smaller --batch-size"
    if not memory.fits(memory.train_total) and memory.remedies:
        lines[1] += f"; try {', '.join(memory.remedies)}"
    return lines
