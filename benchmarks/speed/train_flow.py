"""Measure a training step of a FLUX.1-dev-shaped model; writes a section of docs/results/benchmarks.md.

On one random model of FLUX.1-dev's layout (`--divide` its widths, `--blocks` its depth, so that two CPU cores can hold
it; latents of 64 x 64, one pair a step):

- Flow-DPO: one step as training scripts do it, in diffusers' own terms: VAE encode of both images, text encode with
  CLIP and T5, noise, the reference's forward pass (with a LoRA the same model without its adapter, else a second one),
  the policy's forward and backward passes, torch's default AdamW;
- ours: `smpo-train` on shards of the same latent shape, with stored text.

Each program runs in a separate process, in turns; ratios are taken within a turn. The operations of the real model and
of the divided one are counted without computing them, to see whether the division is fair.

    python -m benchmarks.speed.train_flow [--divide 8] [--blocks 4] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.page import ROOT, stamp, write_section
from benchmarks.speed.clock import Clock
from benchmarks.speed.flow_programs import RANK, STEPS, flow_dpo, lora, ours
from benchmarks.speed.shapes import FLUX_BLOCKS, build_flux
from benchmarks.speed.train import SIDE, make_shards

METHODS = ("full", "LoRA")
PROGRAMS = ("Flow-DPO", "ours")
TARGETS = {"full": 2.5, "LoRA": 1.8}
DENOISER_TARGET = 0.97

_REASON = """
Our step leaves out VAE, text encoders and reference. What remains, the policy's forward and backward passes,
has three times the operations of the reference's forward pass; with a LoRA, which needs no gradients of the frozen
weights, a little over twice. So the operations of the real model do not allow the targets: a step gains more only as
far as VAE and text encoders run at a lower rate than the transformer. Not measured: loops that invert inside the step,
as the published SmPO does for Stable Diffusion (sections above)."""


def measure(method: str, program: str, work: Path, divide: int) -> dict[str, float]:
    """Run one program in a separate process; returns mean seconds of a step's parts, and peak GiB."""
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--measure",
        method,
        program,
        "--work",
        str(work),
        "--divide",
        str(divide),
    ]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return json.loads(said.splitlines()[-1])


def _measured(method: str, program: str, work: Path, divide: int) -> dict[str, float]:
    clock = Clock()
    if program == "ours":
        ours(work, method, divide, clock)
    else:
        flow_dpo(work / "model", method, divide, clock)
    counted = clock.steps[1:]
    mean = {part: sum(step[part] for step in counted) / len(counted) for part in counted[0]}
    return {**mean, "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def seconds(parts: dict[str, float]) -> float:
    """Return the seconds of a whole step."""
    return sum(parts.values()) - parts["GiB"]


# Operations, of one pair


def operations(divide: int, blocks: int, side: int) -> dict[str, float]:
    """Count the operations of a pair's step by part, without computing them.

    Args:
        divide: see :func:`shapes.build_flux`.
        blocks: likewise.
        side: of the latents.
    """
    pipe = build_flux(divide, blocks, device="meta")
    transformer, tokens = pipe.transformer, (side // 2) ** 2
    with torch.device("meta"):
        inputs = {
            "hidden_states": torch.zeros(2, tokens, 64),
            "encoder_hidden_states": torch.zeros(2, 512, 4096 // divide),
            "pooled_projections": torch.zeros(2, 768 // divide),
            "timestep": torch.ones(2),
            "guidance": torch.ones(2),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(512, 3),
        }
        ids, pixels = torch.zeros(1, 512, dtype=torch.long), torch.zeros(2, 3, 8 * side, 8 * side)
        found = {"full": _count(lambda: transformer(**inputs).sample.sum().backward())}
        transformer.requires_grad_(False).add_adapter(lora(divide))
        found["LoRA"] = _count(lambda: transformer(**inputs).sample.sum().backward())
        with torch.no_grad():
            found["VAE"] = _count(lambda: pipe.vae.encode(pixels))
            found["text encoders"] = _count(lambda: (pipe.text_encoder(ids[:, :77]), pipe.text_encoder_2(ids)))
            transformer.disable_adapters()
            found["reference"] = _count(lambda: transformer(**inputs))
    return found


def _count(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def ratio_of(counted: dict[str, float], method: str) -> float:
    """Return what Flow-DPO's step has more operations than ours."""
    frozen = counted["VAE"] + counted["text encoders"] + counted["reference"]
    return (frozen + counted[method]) / counted[method]


# The page


def lines_of(turns: list[dict[str, dict[str, float]]], divide: int, blocks: int) -> Iterator[str]:
    """The section's text."""
    real, divided = operations(1, FLUX_BLOCKS, SIDE), operations(divide, blocks, SIDE)
    large = operations(1, FLUX_BLOCKS, 2 * SIDE)
    yield f"A random model of FLUX.1-dev's layout with all widths divided by {divide}, {blocks} double and {2 * blocks}"
    yield f"single blocks (of 19 and 38), and text encoders and VAE divided alike; images of {8 * SIDE} pixels, 512 T5"
    yield f"tokens, float32, one pair per step, LoRA of rank {RANK // divide}, {len(turns)} turns of {STEPS - 1} steps;"
    yield "medians, and ratios within a turn (lowest .. highest). `Flow-DPO` is the loop that training scripts have:"
    yield "VAE, text encoders and reference in each step. `ours` is `smpo-train` with stored noise, reference errors"
    yield "and text."
    yield ""
    yield "| seconds per step | " + " | ".join(f"{method}, {program}" for method, program in _columns()) + " |"
    yield "| --- | " + "--- | " * 4
    parts = ("VAE", "text encoders", "reference", "forward", "backward", "clipping and AdamW", "the rest")
    for part in parts:
        yield _row(part, [_middle(turns, key, lambda run, part=part: run.get(part, 0.0)) for key in _keys()])
    yield _row("**sum**", [_middle(turns, key, seconds) for key in _keys()])
    yield _row("peak GiB", [_middle(turns, key, lambda run: run["GiB"]) for key in _keys()])
    yield ""
    for method in METHODS:
        faster = _ratios(turns, lambda turn, m=method: seconds(turn[f"{m} Flow-DPO"]) / seconds(turn[f"{m} ours"]))
        yield f"- {method}: pairs per second, ours over Flow-DPO: **{faster}** (target {TARGETS[method]});"
        yield f"  by operations {ratio_of(divided, method):.2f}, of the real model {ratio_of(real, method):.2f}"
        passes = _ratios(turns, lambda turn, m=method: _share(turn[f"{m} ours"], "forward", "backward"))
        update = _ratios(turns, lambda turn, m=method: _share(turn[f"{m} ours"], "clipping and AdamW"))
        yield f"- {method}: the denoiser's forward and backward passes over our step: {passes}"
        yield f"  (target {DENOISER_TARGET}); clipping and AdamW: {update}"
    yield ""
    yield from textwrap.wrap(_REASON.strip(), 120)
    yield ""
    yield "Operations of a pair, in units of the policy's forward and backward passes in full training:"
    yield ""
    yield "| | full | LoRA | reference | VAE | text encoders | Flow-DPO over ours, full | LoRA |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, counted in (
        (f"FLUX.1-dev, {16 * SIDE} pixels", large),
        (f"FLUX.1-dev, {8 * SIDE} pixels", real),
        ("divided", divided),
    ):
        shares = [counted[key] / counted["full"] for key in ("full", "LoRA", "reference", "VAE", "text encoders")]
        yield _row(name, [*shares, *(ratio_of(counted, method) for method in METHODS)], digits=3)


def _columns() -> list[tuple[str, str]]:
    return [(method, program) for method in METHODS for program in PROGRAMS]


def _keys() -> list[str]:
    return [f"{method} {program}" for method, program in _columns()]


def _middle(turns: list[dict[str, dict[str, float]]], key: str, value: Callable[[dict[str, float]], float]) -> float:
    return median(value(turn[key]) for turn in turns)


def _ratios(turns: list[dict[str, dict[str, float]]], value: Callable[[dict[str, dict[str, float]]], float]) -> str:
    found = sorted(value(turn) for turn in turns)
    return f"{median(found):.2f} ({found[0]:.2f} .. {found[-1]:.2f})"


def _share(parts: dict[str, float], *names: str) -> float:
    return sum(parts[name] for name in names) / seconds(parts)


def _row(name: str, values: list[float], digits: int = 2) -> str:
    return f"| {name} | " + " | ".join(f"{value:.{digits}f}" for value in values) + " |"


def main() -> None:
    """Run all programs, or the one that --measure names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divide", type=int, default=8, choices=(2, 4, 8))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    divide, blocks = arguments.divide, arguments.blocks
    if arguments.measure:
        print(json.dumps(_measured(*arguments.measure, arguments.work, divide)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build_flux(divide, blocks).save_pretrained(work / "model")
        make_shards(work / "shards", work / "model", trajectories=2, text=True)
        turns = []
        for turn in range(arguments.turns):
            turns.append(
                {f"{method} {program}": measure(method, program, work, divide) for method, program in _columns()}
            )
            print(turn, json.dumps(turns[-1]), flush=True)
    command = f"python -m benchmarks.speed.train_flow --divide {divide} --blocks {blocks} --turns {arguments.turns}"
    text = stamp(command, ("torch", "diffusers", "transformers", "accelerate", "peft"))
    write_section("Training step: FLUX.1-dev", "\n".join([text, "", *lines_of(turns, divide, blocks)]))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
