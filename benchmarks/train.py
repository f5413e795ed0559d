"""What a training step costs, against the published way: writes its section of docs/benchmarks.md.

On one denoiser of Stable Diffusion 1.5's shape (all widths divided by --divide, so that two CPU cores can hold it):

- published: one step as the published scripts do it: VAE encode, text encode, ReNoise inversion with the model in
  training on a 5-node grid, the reference's forward, the policy's forward and backward, AdamW;
- ours: `smpo-train` on shards of the same latent shape;
- bare: the denoiser's forward and backward and AdamW alone, on ready tensors: what no trainer can be cheaper than;
- invert: our walk of 9 steps with one ReNoise step and the reference error at each state, a pair.

Each is measured in a process of its own, in turns; ratios are taken within a turn.

    python benchmarks/train.py [--divide 4] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from page import stamp, write_section
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_schemas.manifest import MANIFEST_VERSION, InversionSettings, Manifest, ModelInfo, Totals, write_manifest
from smpo_schemas.scores import RewardStatistics
from smpo_schemas.shard_index import write_index
from smpo_schemas.shards import Sample, SampleMeta, ShardDirectory, ShardWriter

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "pipeline/smpo_pipeline/toy/assets/model/tokenizer"
LATENT = (4, 64, 64)
IMAGE = 512
PAIRS = 2
"""A batch, in pairs, of every program."""

GRID = 5
"""Nodes of the published inversion on SD1.5."""

STEPS = 9
BETA, GAMMA = 2000.0, 10.0
RUNS = (1, 2, 5, 10)


def make_model(path: Path, divide: int) -> None:
    """A random model of SD1.5's layout with all widths divided."""
    torch.manual_seed(0)
    width = 768 // divide
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=12 // divide,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(each // divide for each in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=LATENT[0],
        norm_num_groups=32 // divide,
        sample_size=IMAGE,
    )
    unet = UNet2DConditionModel(
        sample_size=LATENT[-1],
        block_out_channels=tuple(each // divide for each in (320, 640, 1280, 1280)),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=32 // divide,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip


def make_shards(path: Path, model: Path, walks: int) -> None:
    """Shards of random latents: what a training step costs does not depend on what they show."""
    stream = torch.Generator().manual_seed(1)
    with ShardWriter(path / "shard-000000.tar") as writer:
        for number in range(walks):
            meta = SampleMeta(
                pair_id=str(number), walk=0, flipped=False, prompt="a small red circle", prompt_dropped=False,
                label=1.0, annotator=None, scores={"taste": (0.3, 0.7)}, size=((IMAGE, IMAGE),) * 2, crop=((0, 0),) * 2,
            )  # fmt: skip
            tensors = [torch.randn(shape, generator=stream).half() for shape in ((2, *LATENT), (STEPS, 2, *LATENT))]
            timesteps = torch.arange(1, STEPS + 1) * 100
            writer.write(
                f"{number:08d}",
                Sample(meta, *tensors, timesteps, torch.ones(STEPS, 2), torch.zeros(STEPS, 2)),
            )
    family, entry = load_family(str(model)), writer.entry
    reference = fingerprint_module(family.denoiser)
    statistics = RewardStatistics(
        model="none", fingerprint="none", unit="none", min=0, max=1, mean=0.5, std=0.3, agreement=None, num_labelled=0
    )
    manifest = Manifest(
        schema_version=MANIFEST_VERSION,
        model=ModelInfo(
            id=str(model), kind=family.kind, prediction_type=family.process.prediction_type, reference=reference,
            walker=reference, text=fingerprint_module(*family.text_modules), vae=fingerprint_module(family.vae),
            scheduler=family.process.fingerprint(), num_train_timesteps=family.process.num_train_timesteps,
        ),
        resolution=IMAGE, inversion=InversionSettings(), seed=0, rewards={"taste": statistics}, shards=[entry],
        totals=Totals(
            pairs_in=walks, pairs=walks, samples=walks, states=entry.states, rejected=0, bytes=entry.bytes
        ),
        rejected_reasons={}, health=[], versions={},
    )  # fmt: skip
    index = write_index(ShardDirectory(path, manifest))
    write_manifest(path, manifest.model_copy(update={"index": index}))


# The measured programs: each prints seconds of its steps and its peak memory


def published(model: Path) -> list[float]:
    """Seconds of one step at each fifth of the timesteps: the mean over them is that over a uniform t."""
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(GRID)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
    policy, reference = (UNet2DConditionModel.from_pretrained(model, subfolder="unet") for _ in range(2))
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-8)
    pixels = torch.randn(2 * PAIRS, 3, IMAGE, IMAGE)
    preference = torch.full((PAIRS,), 0.4)

    def step(t: int) -> None:
        with torch.no_grad():
            x0 = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            ids = tokenizer(["a small red circle"] * PAIRS, padding="max_length", return_tensors="pt").input_ids
            seen = text(ids)[0].repeat(2, 1, 1)
            x = x0
            for node in [node for node in inverse.timesteps.tolist() if node <= t]:
                first = policy(x, node, seen).sample
                second = policy(inverse.step(first, node, x).prev_sample, node, seen).sample
                x = inverse.step((first + second) / 2, node, x).prev_sample
            level = scheduler.alphas_cumprod[t]
            noise = (x - level.sqrt() * x0) / (1 - level).sqrt()
            reference_error = _error(reference, x, t, seen, noise)
        error = _error(policy, x, t, seen, noise)
        _update(optimizer, error, reference_error, preference)

    return [_timed(lambda t=t: step(t)) for t in (100, 100, 300, 500, 700, 900)][1:]


def bare(model: Path) -> list[float]:
    """Seconds of forward, backward and AdamW on ready tensors."""
    policy = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-8)
    x, noise = torch.randn(2, 2 * PAIRS, *LATENT)
    seen = torch.randn(2 * PAIRS, 77, policy.config.cross_attention_dim)
    reference_error, preference = torch.ones(2 * PAIRS), torch.full((PAIRS,), 0.4)

    def step() -> None:
        _update(optimizer, _error(policy, x, 500, seen, noise), reference_error, preference)

    return [_timed(step) for _ in range(6)][1:]


def forwards(model: Path) -> list[float]:
    """Seconds of one forward without gradients."""
    policy = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
    x, seen = torch.randn(2 * PAIRS, *LATENT), torch.randn(2 * PAIRS, 77, policy.config.cross_attention_dim)

    @torch.no_grad()
    def step() -> None:
        policy(x, 500, seen)

    return [_timed(step) for _ in range(6)][1:]


def ours(model: Path, shards: Path, out: Path) -> tuple[list[float], float]:
    """Seconds of smpo-train's steps, and the share of them that waited for data, in percent."""
    shutil.rmtree(out, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "smpo-train"), "--shards", shards, "--model", model, "--out", out]
    options = ["--max-steps", 7, "--batch-size", PAIRS, "--warmup-steps", 0, "--lr", 1e-8]
    subprocess.run([*map(str, command), *map(str, options)], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    waits = [record["data_wait_percent"] for record in records]
    return [PAIRS / record["pairs_per_second"] for record in records], median(waits)


def _error(model: torch.nn.Module, x: torch.Tensor, t: int, seen: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return (model(x, t, seen).sample - noise).square().mean(dim=(1, 2, 3))


def _update(
    optimizer: torch.optim.Optimizer, error: torch.Tensor, reference: torch.Tensor, preference: torch.Tensor
) -> None:
    margin = -(BETA / 2) * ((error[:PAIRS] - error[PAIRS:]) - (reference[:PAIRS] - reference[PAIRS:]))
    functional.softplus(-GAMMA * (2 * preference - 1) * margin).mean().backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(program: str, work: Path) -> dict[str, float]:
    """Run one program in a process of its own: mean seconds of a step, peak GiB, and its data wait in percent."""
    command = [sys.executable, __file__, "--measure", program, "--work", str(work)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(said.splitlines()[-1])


def _measured(program: str, work: Path) -> dict[str, float]:
    model, wait, whose = work / "model", 0.0, resource.RUSAGE_SELF
    if program == "ours":
        seconds, wait = ours(model, work / "shards", work / "run")
        whose = resource.RUSAGE_CHILDREN
    else:
        seconds = {"published": published, "bare": bare, "forwards": forwards}[program](model)
    peak = resource.getrusage(whose).ru_maxrss / 2**20
    return {"seconds": sum(seconds) / len(seconds), "gib": peak, "wait": wait}


# The page


def lines_of(turns: list[dict[str, dict[str, float]]], divide: int) -> Iterator[str]:
    """The section's text."""

    def ratio(above: str, below: str, key: str = "seconds") -> str:
        values = sorted(turn[above][key] / turn[below][key] for turn in turns)
        return f"{median(values):.2f} ({values[0]:.2f} .. {values[-1]:.2f})"

    def middle(program: str, key: str = "seconds") -> float:
        return median(turn[program][key] for turn in turns)

    yield f"UNet, VAE and text encoder of SD1.5's layout with all widths divided by {divide}, latents 4 x 64 x 64,"
    yield f"float32, {PAIRS} pairs a batch, {len(turns)} turns; medians, and ratios within a turn (lowest .. highest)."
    yield ""
    yield "| program | seconds a step | peak GiB |"
    yield "| --- | --- | --- |"
    for program in ("published", "ours", "bare"):
        yield f"| {program} | {middle(program):.2f} | {middle(program, 'gib'):.2f} |"
    yield ""
    yield f"- pairs/s, ours over published: **{ratio('published', 'ours')}**"
    yield f"- peak memory, ours over published: {ratio('ours', 'published', 'gib')}"
    yield f"- forward, backward and AdamW alone over our step: {ratio('bare', 'ours')}"
    yield f"- data wait: {middle('ours', 'wait'):.1f} % of our step"
    yield ""
    yield "The whole account: inverting a data set once and training n times on it, against n published trainings over"
    yield "as many states, one visit each. A pair's walk of 9 steps costs 27 forwards (two estimates and one for the"
    yield "reference error a step) and gives 9 states; a published step takes one state of a pair."
    yield ""
    yield "| n trainings | published | ours, inversion included | published over ours |"
    yield "| --- | --- | --- | --- |"
    inversion = 3 * middle("forwards")  # a state
    for n in RUNS:
        theirs, mine = n * middle("published"), inversion + n * middle("ours")
        yield f"| {n} | {theirs:.1f} s | {mine:.1f} s | {theirs / mine:.2f} |"
    yield ""
    yield f"Seconds are per {PAIRS} states. VAE and text encoding of the inversion are left out here: they come once a"
    yield "walk, not once a state."


def main() -> None:
    """Run everything, or one program where --measure names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divide", type=int, default=4, choices=(1, 2, 4))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(_measured(arguments.measure, arguments.work)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model", arguments.divide)
        make_shards(work / "shards", work / "model", walks=4)
        turns = []
        for turn in range(arguments.turns):
            turns.append({program: measure(program, work) for program in ("published", "ours", "bare", "forwards")})
            print(turn, json.dumps(turns[-1]), flush=True)
    command = f"python benchmarks/train.py --divide {arguments.divide} --turns {arguments.turns}"
    text = stamp(command, ("torch", "diffusers", "transformers", "accelerate"))
    write_section("Training step", "\n".join([text, "", *lines_of(turns, arguments.divide)]))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
