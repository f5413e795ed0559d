"""Measure the denoiser's share of the time of `smpo-pipeline generate`, and what Ray costs over a bare loop.

Writes a section of docs/results/benchmarks.md. Two models with DDIM, guidance 1 and 5: the embedded world's, and a
random one with the layout of Stable Diffusion 1.5 and its widths divided by 4. Measured in turns, each program in a
process of its own:

- loop: the same pipeline in one process, which samples a batch, encodes its images as PNG, writes them, and so on;
- job: the whole Ray job with one actor, and CPU tasks that encode, write and commit beside it.

The share is the time inside the denoiser's forward passes over wall-clock time, both from the end of the first unit's
sampling, during which libraries still initialise, to the last unit's commit.

    python -m benchmarks.speed.generate [--device cpu|cuda] [--turns N] [--units N] [--models world sd15]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.page import stamp, write_section
from benchmarks.speed.clock import now
from benchmarks.speed.shapes import make_model
from smpo_common.files import write_bytes
from smpo_pipeline.generation.encoding import encode_image
from smpo_pipeline.generation.generator import Generator, quiet_libraries
from smpo_pipeline.generation.prompts import read_prompts
from smpo_pipeline.jobs.cluster.session import set_reproducible_arithmetic
from smpo_pipeline.jobs.generate import job
from smpo_pipeline.jobs.generate.actor import GenerateActor, SamplingWork
from smpo_pipeline.jobs.generate.models import choose_settings, load
from smpo_pipeline.jobs.generate.options import (
    CandidateFileOptions,
    CandidateOptions,
    GenerateJobOptions,
    GenerateOptions,
)
from smpo_pipeline.toy.create import ASSETS
from smpo_pipeline.toy.world import all_scenes

STEPS, IMAGES = 20, 4
GUIDANCE = (1.0, 5.0)
PARTS = ("denoiser", "VAE", "text encoder")
TARGET_SHARE, TARGET_COST = 0.9, 1.05
PROGRAMS = ("loop", "job")


@dataclass(frozen=True)
class Subject:
    """A model, and how much of it is measured: images of a batch and prompts of a unit."""

    name: str
    side: int
    batch: int
    prompts: int


SUBJECTS = {
    "world": Subject("the embedded world's model", 32, 16, 32),
    "sd15": Subject("Stable Diffusion 1.5, widths / 4", 256, 4, 1),
}


# The measured programs


class Parts:
    """Seconds inside the denoiser, the VAE and the text encoder of a pipeline."""

    def __init__(self, generator: Generator) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        pipeline: Any = generator.pipeline
        generator.denoiser.forward = self._timed("denoiser", generator.denoiser.forward)
        pipeline.vae.decode = self._timed("VAE", pipeline.vae.decode)
        pipeline.encode_prompt = self._timed("text encoder", pipeline.encode_prompt)

    def _timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object, **named: object) -> Any:  # noqa: ANN401  (whatever it returns)
            began = now()
            found = work(*arguments, **named)
            self.seconds[name] += now() - began
            return found

        # Pipelines look at the signature of some.
        call.__wrapped__ = work  # type: ignore[attr-defined]
        return call

    def note(self, file: Path) -> None:
        """Append the time and the seconds so far."""
        now()
        with file.open("a") as notes:
            print(json.dumps({"end": time.time(), **self.seconds}), file=notes)


class TimedActor(GenerateActor):
    """The actor, which notes the end of each unit and the seconds of each kind of work so far."""

    def __init__(self, work: SamplingWork, content: Mapping[str, Any]) -> None:
        super().__init__(work, content)
        self._parts, self._notes = Parts(self._generator), work.run.out.parent / "units.jsonl"

    def __call__(self, row: pa.Table) -> pa.Table:
        """Sample one unit."""
        made = super().__call__(row)
        self._parts.note(self._notes)
        return made


def options_of(subject: Subject, work: Path, out: Path, guidance: float, device: str) -> GenerateOptions:
    """Options of `generate`."""
    return GenerateOptions(
        model=str(work / "model"),
        prompts=work / "prompts.txt",
        out=out / "candidates",
        sampling=CandidateOptions(
            sampler="ddim",
            images_per_prompt=IMAGES,
            steps=STEPS,
            guidance_scale=guidance,
            resolution=subject.side,
        ),
        storing=CandidateFileOptions(prompts_per_file=subject.prompts),
        running=GenerateJobOptions(batch_size=subject.batch, device=device, dtype="fp32", concurrency=1),
    )


def run_loop(options: GenerateOptions, out: Path) -> float:
    """Run the loop; returns when its last unit was written."""
    device = options.running.chosen_device
    set_reproducible_arithmetic(device)
    quiet_libraries()
    _, settings = choose_settings(options)
    generator = load(options.loading, device, settings.dtype)
    parts = Parts(generator)
    prompts = read_prompts(options.prompts).texts
    wanted = [(prompt, index) for prompt in prompts for index in range(IMAGES)]
    per_unit, size = options.prompts_per_file * IMAGES, options.running.batch_size
    for start in range(0, len(wanted), size):
        for number, sampled in enumerate(generator.sample(wanted[start : start + size], settings), start):
            write_bytes(out / "images" / f"{number}.png", encode_image(np.asarray(sampled.image), "png"))
        if (start + size) % per_unit == 0:
            parts.note(out / "units.jsonl")
    return time.time()


def run_job(options: GenerateOptions, _out: Path) -> float:
    """Run the whole job; returns when its last unit was committed."""
    committed: list[float] = []
    run_units = job.run_units

    def watched(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        records = run_units(*arguments, **named)
        committed.extend(record.committed for record in arguments[0].records().values())
        return records

    job.run_units = watched
    job.GenerateActor = TimedActor
    job.generate(options)
    return max(committed)


def measured(program: str, subject: Subject, work: Path, guidance: float, device: str) -> dict[str, float]:
    """Run a program in this process; returns its seconds, in total and by kind of work, after the first unit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        began = time.time()
        options = options_of(subject, work, out, guidance, device)
        end = {"loop": run_loop, "job": run_job}[program](options, out)
        whole = time.time() - began
        notes = [json.loads(line) for line in (out / "units.jsonl").read_text().splitlines()]
    parts = {name: notes[-1][name] - notes[0][name] for name in PARTS}
    return {"clock": end - notes[0]["end"], **parts, "whole": whole, "units": len(notes)}


# Inputs


def make_inputs(name: str, work: Path, units: int) -> None:
    """Write the model, or link to it, and distinct prompts."""
    work.mkdir()
    if name == "world":
        (work / "model").symlink_to(ASSETS / "model")
    else:
        make_model(work / "model", name, 4, SUBJECTS[name].side // 8)
    captions = [scene.caption for scene in all_scenes()]
    count = units * SUBJECTS[name].prompts
    prompts = [f"{captions[number % len(captions)]}{' ' + 'x' * (number // len(captions))}" for number in range(count)]
    (work / "prompts.txt").write_text("\n".join(prompts))


def measure(program: str, name: str, work: Path, guidance: float, device: str) -> dict[str, float]:
    """Run a program in a separate process."""
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--measure",
        program,
        name,
        str(guidance),
        str(work),
        "--device",
        device,
    ]
    # Ray makes its workers nice; beside other work, the job would then be compared to a loop that is not.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(name, guidance, program, json.dumps(found), flush=True)
    return found


# The page

Turn = Mapping[str, Mapping[str, float]]
"""What each program measured in one turn."""


def page(turns: Mapping[tuple[str, float], Sequence[Turn]], device: str, command: str) -> str:
    """Make the section."""

    def spread(values: Sequence[float], digits: int = 3) -> str:
        return f"{median(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"

    def share(name: str, program: str, some: Sequence[Turn]) -> str:
        return spread([turn[program][name] / turn[program]["clock"] for turn in some])

    def rate(subject: Subject, program: str, some: Sequence[Turn]) -> str:
        images = [subject.prompts * IMAGES * (turn[program]["units"] - 1) / turn[program]["clock"] for turn in some]
        return spread(images, 2)

    rows = []
    for (name, guidance), some in turns.items():
        cells = [share(part, "job", some) for part in PARTS]
        cost = spread([turn["job"]["clock"] / turn["loop"]["clock"] for turn in some])
        rates = [rate(SUBJECTS[name], program, some) for program in PROGRAMS]
        rows.append(f"| {SUBJECTS[name].name}, guidance {guidance:g} | {' | '.join([*cells, *rates, cost])} |")
    sizes = "; ".join(
        f"{each.name}: {each.side} pixels, batches of {each.batch}, units of {IMAGES * each.prompts} images"
        for each in (SUBJECTS[name] for name in dict.fromkeys(name for name, _ in turns))
    )
    count = len(next(iter(turns.values())))
    return f"""{stamp(command, ("torch", "diffusers", "transformers", "ray"), device=device)}

{STEPS} DDIM steps in float32, {IMAGES} images per prompt, PNG, one actor; {sizes}.
Shares are of the wall-clock time of the whole Ray job from the end of the first unit's sampling to the last unit's
commit: imports, loading and fingerprinting the model, Ray's start and end, and the first unit are left out. The loop is
one process that samples a batch, encodes and writes it, and so on; the job encodes beside the actor. Turns:
{count}; medians, with the smallest and the largest in brackets. Targets: the denoiser's share at least {TARGET_SHARE},
the job's time at most {TARGET_COST} of the loop's.

| | denoiser | VAE | text encoder | images/s, loop | images/s, job | job's time over the loop's |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> None:
    """Run all programs, or the one that --measure names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--units", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    arguments = parser.parse_args()
    if arguments.measure:
        program, name, guidance, work = arguments.measure
        print(json.dumps(measured(program, SUBJECTS[name], Path(work), float(guidance), arguments.device)))
        return
    turns: dict[tuple[str, float], list[Turn]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            make_inputs(name, Path(folder) / name, arguments.units)
        for _ in range(arguments.turns):
            for name in arguments.models:
                for guidance in GUIDANCE:
                    found = {
                        program: measure(program, name, Path(folder) / name, guidance, arguments.device)
                        for program in PROGRAMS
                    }
                    turns.setdefault((name, guidance), []).append(found)
    flags = f"--device {arguments.device} --turns {arguments.turns} --units {arguments.units}"
    command = f"python -m benchmarks.speed.generate {flags}"
    title = "Generation" + (" on a GPU" if arguments.device == "cuda" else "")
    write_section(title, page(turns, arguments.device, command))


if __name__ == "__main__":
    main()
