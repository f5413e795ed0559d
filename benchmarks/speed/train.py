"""Measure the cost of a training step against the published scripts; writes sections of docs/results/benchmarks.md.

On one denoiser of a published model's shape (`--shape`; all widths divided by `--divide`, so that two CPU cores can
hold it):

- published: one step as the published scripts do it: VAE encode, text encode, ReNoise inversion with the model in
  training on their grid, the reference's forward pass, the policy's forward and backward passes, torch's default AdamW;
- ours: `smpo-train` on shards of the same latent shape;
- bare: the denoiser's forward and backward passes and the trainer's fused AdamW alone, on ready tensors: a lower
  bound;
- invert: our inversion of images of that size, 9 steps with one ReNoise step, everything included except Ray.

Each program runs in a separate process, in turns; ratios are taken within a turn.

    python -m benchmarks.speed.train [--shape sd15|sdxl] [--divide 4] [--device cpu|cuda] [--turns 3]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import nn
from torch.nn import functional

from benchmarks.page import ROOT, stamp, write_section
from benchmarks.speed.clock import now
from benchmarks.speed.shapes import SHAPES, Shape, make_model
from smpo_models.family import Conditioning, Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.inverter import Inverter
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import (
    MANIFEST_VERSION,
    TEXT_FOLDER,
    Manifest,
    ModelInfo,
    StoredTextEntry,
    Totals,
    write_manifest,
)
from smpo_schemas.scoring.scores import RewardStatistics
from smpo_schemas.shards.index import write_index
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import Sample, SampleMeta
from smpo_schemas.shards.text import TEXT_INDEX, text_file_name, write_text, write_text_index
from smpo_schemas.shards.text_rows import split_rows
from smpo_schemas.shards.writer import ShardWriter

SIDE = 64
"""Of the latents; images are eight times larger."""

PROMPT = "a small red circle on a blue background"
STEPS = InversionSettings().steps
GAMMA = 10.0
RUNS = (1, 2, 5, 10)


def make_shards(path: Path, model: Path, trajectories: int, *, text: bool = False) -> None:
    """Write shards of random latents, and with ``text`` the prompt's embeddings.

    The cost of a training step does not depend on their content.
    """
    stream, family = torch.Generator().manual_seed(1), load_family(str(model))
    latent, size = family.latent_shape(8 * SIDE, 8 * SIDE), ((8 * SIDE, 8 * SIDE),) * 2
    with ShardWriter(path / "shard-000000.tar") as writer:
        for number in range(trajectories):
            meta = SampleMeta(
                pair_id=str(number), trajectory=0, flipped=False, prompt=PROMPT, prompt_dropped=False,
                label=1.0, annotator=None, scores={"taste": (0.3, 0.7)}, size=size, crop=((0, 0),) * 2,
            )  # fmt: skip
            shapes = ((2, *latent), (STEPS, 2, *latent))
            x0, noise = (torch.randn(shape, generator=stream).half() for shape in shapes)
            timesteps = (torch.arange(1, STEPS + 1) * 100).to(family.noise_schedule.timestep_dtype)
            sample = Sample(meta, x0, noise, timesteps, torch.ones(STEPS, 2), torch.zeros(STEPS, 2))
            writer.write(f"{number:08d}", sample)
    entry = writer.entry
    reference = fingerprint_module(family.denoiser)
    statistics = RewardStatistics(
        model="none", fingerprint="none", unit="none", min=0, max=1, mean=0.5, std=0.3, agreement=None, num_labelled=0
    )
    manifest = Manifest(
        schema_version=MANIFEST_VERSION,
        model=ModelInfo(
            id=str(model), kind=family.kind, prediction_type=family.noise_schedule.prediction_type, reference=reference,
            inverting_denoiser=reference, text=fingerprint_module(*family.text_modules),
            vae=fingerprint_module(family.vae),
            scheduler=family.noise_schedule.fingerprint(),
            num_train_timesteps=family.noise_schedule.num_train_timesteps,
        ),
        resolution=8 * SIDE, inversion=InversionSettings(), seed=0, rewards={"taste": statistics}, shards=[entry],
        totals=Totals(
            pairs_in=trajectories, pairs=trajectories, samples=trajectories, states=entry.states, rejected=0,
            bytes=entry.bytes
        ),
        rejected_reasons={}, health=[], versions={}, ref_error_arithmetic="fp32",
        text=_store_text(path / TEXT_FOLDER, family) if text else None,
    )  # fmt: skip
    index = write_index(ShardDirectory(path, manifest))
    write_manifest(path, manifest.model_copy(update={"index": index}))


def _store_text(folder: Path, family: Family) -> StoredTextEntry:
    prompts = [PROMPT, ""]
    file = write_text(folder / text_file_name(0), prompts, split_rows(family.encode_text(prompts)))
    index = write_text_index(folder / TEXT_INDEX, prompts, [False] * 2, len(prompts))
    return StoredTextEntry(dtype="float32", prompts=2, bytes=file.bytes + index.bytes, index=index, files=[file])


# The measured programs: seconds of their steps


def published(model: Path, shape: Shape, device: str) -> list[float]:
    """Seconds of one step at each fifth of the timesteps, whose mean is the mean over a uniform t."""
    family = load_family(str(model), device=device)
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(shape.grid)
    delta = scheduler.config.num_train_timesteps // shape.grid
    policy, optimizer = _policy(family, fused=False)
    pixels = torch.randn(2 * shape.pairs, 3, 8 * SIDE, 8 * SIDE, device=device)

    def step(t: int) -> None:
        with torch.no_grad():
            mean, std = family.posterior(pixels)
            x0 = mean + std * torch.randn_like(mean)
            seen = _condition(family, shape)
            x = x0
            for node in [node for node in inverse.timesteps.tolist() if node - delta < t]:
                first = _predict(family, policy, x, node - delta, seen)
                second = _predict(family, policy, inverse.step(first, node, x).prev_sample, node - delta, seen)
                x = inverse.step((first + second) / 2, node, x).prev_sample
            level = scheduler.alphas_cumprod[t]
            noise = (x - level.sqrt() * x0) / (1 - level).sqrt()
            reference_error = _error(_predict(family, family.denoiser, x, t, seen), noise)
        _update(optimizer, _error(_predict(family, policy, x, t, seen), noise), reference_error, shape)

    return [_timed(lambda t=t: step(t)) for t in (100, 100, 300, 500, 700, 900)][1:]


def bare(model: Path, shape: Shape, device: str) -> list[float]:
    """Seconds of forward, backward and the trainer's AdamW on ready tensors."""
    family = load_family(str(model), device=device)
    policy, optimizer = _policy(family, fused=True)
    x, noise = torch.randn(2, 2 * shape.pairs, 4, SIDE, SIDE, device=device)
    seen, reference_error = _condition(family, shape), torch.ones(2 * shape.pairs, device=device)

    def step() -> None:
        _update(optimizer, _error(_predict(family, policy, x, 500, seen), noise), reference_error, shape)

    return [_timed(step) for _ in range(6)][1:]


def invert(model: Path, shape: Shape, device: str) -> list[float]:
    """Seconds of inversion for as many states as a training step takes: images to samples, without warm-up."""
    family = load_family(str(model), device=device)
    inverter = Inverter(family, family.denoiser, InversionSettings(), seed=0)
    stream, side = np.random.default_rng(0), 8 * SIDE

    def pair(number: int) -> PreparedPair:
        return PreparedPair(
            pair_id=str(number), prompt=PROMPT, label=1.0, annotator=None, scores={"taste": (0.3, 0.7)},
            pixels_2HW3=stream.integers(0, 256, (2, side, side, 3), dtype=np.uint8),
            size=((side, side),) * 2, crop=((0, 0),) * 2, measured=False,
        )  # fmt: skip

    pairs = [pair(number) for number in range(shape.pairs)]
    return [_timed(lambda: inverter.invert([(each, 0) for each in pairs])) / STEPS]


def ours(model: Path, shape: Shape, device: str, shards: Path, out: Path) -> tuple[list[float], float]:
    """Seconds of smpo-train's steps, and the share of them that waited for data, in percent."""
    shutil.rmtree(out, ignore_errors=True)
    command = [Path(sys.executable).parent / "smpo-train", "--shards", shards, "--model", model, "--out", out]
    command += ["--device", device]
    options = ["--max-steps", 7, "--batch-size", shape.pairs, "--warmup-steps", 0, "--lr", 1e-8, "--beta", shape.beta]
    subprocess.run([*map(str, command), *map(str, options)], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    waits = [record["data_wait_percent"] for record in records]
    return [shape.pairs / record["states_per_second"] for record in records], median(waits)


def _policy(family: Family, *, fused: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make a trainable copy of the denoiser, in evaluation mode like the others: these models have no dropout."""
    policy = copy.deepcopy(family.denoiser).requires_grad_(True)
    family.denoiser.requires_grad_(False)
    return policy, torch.optim.AdamW(policy.parameters(), lr=1e-8, fused=fused)


def _condition(family: Family, shape: Shape) -> Conditioning:
    side = 8 * SIDE
    with torch.no_grad():
        return family.condition(
            [PROMPT] * 2 * shape.pairs, [(side, side)] * 2 * shape.pairs, [(0, 0)] * 2 * shape.pairs
        )


def _predict(family: Family, denoiser: nn.Module, x: torch.Tensor, t: int, seen: Conditioning) -> torch.Tensor:
    return family.denoise(denoiser, x, torch.full((len(x),), t, device=x.device), seen)


def _error(output: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return (output - noise).square().mean(dim=(1, 2, 3))


def _update(optimizer: torch.optim.Optimizer, error: torch.Tensor, reference: torch.Tensor, shape: Shape) -> None:
    (error_0, error_1), (ref_0, ref_1) = error.chunk(2), reference.chunk(2)
    margin = -(shape.beta / 2) * ((error_0 - error_1) - (ref_0 - ref_1))
    preference = torch.full((shape.pairs,), 0.4, device=error.device)
    functional.softplus(-GAMMA * (2 * preference - 1) * margin).mean().backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _timed(work: Callable[[], object]) -> float:
    started = now()
    work()
    return now() - started


def measure(program: str, arguments: argparse.Namespace, work: Path) -> dict[str, float]:
    """Run one program in a separate process; returns mean seconds per step, peak GiB, and its data wait in percent."""
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--measure",
        program,
        "--work",
        str(work),
        "--shape",
        arguments.shape,
    ]
    command += ["--device", arguments.device]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(said.splitlines()[-1])


def _measured(program: str, shape: Shape, device: str, work: Path) -> dict[str, float]:
    # No program uses TF32, as our commands do not.
    torch.backends.cudnn.allow_tf32 = False
    model, wait, whose = work / "model", 0.0, resource.RUSAGE_SELF
    if program == "ours":
        seconds, wait = ours(model, shape, device, work / "shards", work / "run")
        whose = resource.RUSAGE_CHILDREN
    else:
        seconds = {"published": published, "bare": bare, "invert": invert}[program](model, shape, device)
    peak = resource.getrusage(whose).ru_maxrss / 2**20
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30 if program != "ours" else _peak_of_training(work / "run")
    return {"seconds": sum(seconds) / len(seconds), "gib": peak, "wait": wait}


def _peak_of_training(out: Path) -> float:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return max(record["memory_gib"] for record in records)


# The page


def lines_of(turns: list[dict[str, dict[str, float]]], shape: Shape, divide: int) -> Iterator[str]:
    """The section's text."""

    def ratio(above: str, below: str, key: str = "seconds") -> str:
        values = sorted(turn[above][key] / turn[below][key] for turn in turns)
        return f"{median(values):.2f} ({values[0]:.2f} .. {values[-1]:.2f})"

    def middle(program: str, key: str = "seconds") -> float:
        return median(turn[program][key] for turn in turns)

    yield f"UNet, VAE and text encoders of {shape.name}'s layout with all widths divided by {divide}, latents"
    yield f"4 x {SIDE} x {SIDE}, float32, {shape.pairs} pairs per batch, {len(turns)} turns; medians, and ratios within"
    yield f"a turn (lowest .. highest). `published` inverts on {shape.grid} nodes, up to the first that is not below a"
    yield "uniform t, and uses torch's default AdamW, as the published scripts do; `ours` and `bare` use the fused one."
    yield f"`invert` is our trajectory of {STEPS} steps; its seconds are for as many states as a training step takes."
    yield ""
    yield "| program | seconds per step | peak GiB |"
    yield "| --- | --- | --- |"
    for program in ("published", "ours", "bare", "invert"):
        yield f"| {program} | {middle(program):.2f} | {middle(program, 'gib'):.2f} |"
    yield ""
    yield f"- pairs per second, ours over published: **{ratio('published', 'ours')}**"
    yield f"- peak memory, ours over published: {ratio('ours', 'published', 'gib')}"
    yield f"- forward, backward and AdamW alone over our step: {ratio('bare', 'ours')}"
    yield f"- waiting for data: {middle('ours', 'wait'):.1f} % of our step"
    yield ""
    yield "Total cost in seconds per visited state: inverting a data set once and training n times on it, against n"
    yield "published trainings that visit as many states."
    yield ""
    yield "| n trainings | published | ours, inversion included | published over ours |"
    yield "| --- | --- | --- | --- |"
    for n in RUNS:
        theirs = n * middle("published") / shape.pairs
        mine = (middle("invert") + n * middle("ours")) / shape.pairs
        yield f"| {n} | {theirs:.2f} | {mine:.2f} | {theirs / mine:.2f} |"


def main() -> None:
    """Run all programs, or the one that --measure names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="sd15", choices=SHAPES)
    parser.add_argument("--divide", type=int, default=4, choices=(1, 2, 4))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="Of all programs.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.measure:
        print(json.dumps(_measured(arguments.measure, shape, arguments.device, arguments.work)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", arguments.shape, arguments.divide, SIDE)
        make_shards(work / "shards", work / "model", trajectories=4)
        turns = []
        for turn in range(arguments.turns):
            turns.append({each: measure(each, arguments, work) for each in ("published", "ours", "bare", "invert")})
            print(turn, json.dumps(turns[-1]), flush=True)
    flags = f"--shape {arguments.shape} --divide {arguments.divide} --device {arguments.device}"
    libraries = ("torch", "diffusers", "transformers", "accelerate")
    text = stamp(
        f"python -m benchmarks.speed.train {flags} --turns {arguments.turns}", libraries, device=arguments.device
    )
    title = f"Training step: {shape.name}" + (" on a GPU" if arguments.device == "cuda" else "")
    write_section(title, "\n".join([text, "", *lines_of(turns, shape, arguments.divide)]))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
