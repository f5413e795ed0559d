"""Measure the denoiser's share of the time of `smpo-pipeline invert`; writes a section of docs/results/benchmarks.md.

The embedded world's model and pictures, batches of 16 trajectories, every setting at its default. Measured in turns,
each program in a process of its own:

- actor: the actor's loop without Ray (`InvertActor` on units that are prepared already, tars written and committed);
- job: the whole Ray job, which also reads, decodes and crops beside the actor, and writes index and manifest.

The share is the time inside the denoiser's forward passes over wall-clock time, both from the end of the first unit,
during which libraries still initialise.

    python -m benchmarks.speed.invert [--device cpu|cuda] [--turns N]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.page import stamp, write_section
from benchmarks.speed.clock import now
from smpo_pipeline.jobs.invert import actor as invert_unit
from smpo_pipeline.jobs.invert import job
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.invert.models import describe_model, load_models
from smpo_pipeline.jobs.invert.options import InvertJobOptions, InvertOptions, ModelOptions, StorageOptions
from smpo_pipeline.jobs.invert.prepare import prepare_unit, unit_row
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.toy.create import ASSETS
from smpo_pipeline.toy.world import all_scenes, random_centre, render
from smpo_schemas.manifest import MANIFEST_FILE
from smpo_schemas.pairs import layouts_of, list_pair_files, slice_files
from smpo_schemas.scoring.scores import SCORES_VERSION, RewardStatistics, ScoresInfo, write_part, write_scores_info

BATCH = 16
PAIRS_A_UNIT, UNITS = 64, 4
SIDE = 32
FORWARDS_A_PAIR = 2 * 27
"""Two images; two estimates and one forward for the reference error at each of nine steps."""

TARGETS = {"actor": 0.9, "job": 0.85}


# The measured programs


def timed(work: Callable[..., Any], note: Callable[[float], None]) -> Callable[..., Any]:
    """Wrap a function to report the seconds of each call to ``note``."""

    def call(*arguments: object) -> Any:  # noqa: ANN401  (whatever it returns)
        began = now()
        found = work(*arguments)
        note(now() - began)
        return found

    return call


class TimedActor(InvertActor):
    """The actor, which records the end of each unit and the seconds of each kind of work."""

    def __init__(self, options: InvertOptions, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(options, **kwargs)
        self._notes = options.out.parent / "units.jsonl"
        self.seconds = dict.fromkeys(("denoiser", "VAE", "text encoder"), 0.0)
        self._began = 0.0
        self._family.denoiser.register_forward_pre_hook(self._begin)
        self._family.denoiser.register_forward_hook(self._end)
        self._family.posterior = timed(self._family.posterior, partial(self._add, "VAE"))
        self._family.condition = timed(self._family.condition, partial(self._add, "text encoder"))

    def _begin(self, *_call: object) -> None:
        self._began = now()

    def _end(self, *_call: object) -> None:
        self._add("denoiser", now() - self._began)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds

    def __call__(self, row: pa.Table) -> pa.Table:
        """Invert and commit one unit."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        record = super().__call__(row)
        with self._notes.open("a") as file:
            print(json.dumps({"end": now(), **self.seconds}), file=file)
        return record


def options_of(work: Path, out: Path, device: str) -> InvertOptions:
    """Options of `invert`."""
    return InvertOptions(
        pairs=[work / "pairs.parquet"],
        scores=work / "scores",
        out=out / "shards",
        models=ModelOptions(model=str(ASSETS / "model")),
        storing=StorageOptions(pairs_per_shard=PAIRS_A_UNIT),
        running=InvertJobOptions(batch_size=BATCH, device=device, dtype="fp32", concurrency=1, max_reject_rate=0.0),
    )


def run_actor(work: Path, out: Path, device: str) -> float:
    """Run the actor's loop."""
    options = options_of(work, out, device)
    files = list_pair_files(options.pairs)
    layouts = layouts_of(files)
    units = slice_files(files, PAIRS_A_UNIT, None)
    prepared = []
    for unit, ranges in enumerate(units):
        table, _ = prepare_unit(ranges, layouts, unit * PAIRS_A_UNIT, [(SIDE, SIDE)])
        prepared.append(unit_row(unit, table, []))
    invert_unit.ray.get = lambda value: value  # the scores, which Ray would hand over
    scores = pq.read_table(
        work / "scores" / "scores.parquet", columns=["pair_id", "prompt", "pickscore_0", "pickscore_1"]
    )
    run = Run(options.out, MANIFEST_FILE, {})
    run.open(overwrite=False, patterns=())
    model = describe_model(options, *load_models(options))
    actor = TimedActor(
        options,
        model=model,
        run=run,
        scores=scores,
        rows=len(units) * PAIRS_A_UNIT,
        resolution=SIDE,
        work_log=WorkLog(),
    )
    for row in prepared:
        actor(row)
    return 0.0


def run_job(work: Path, out: Path, device: str) -> float:
    """Run the whole job; returns the seconds of rejects, index and manifest."""
    seconds: list[float] = []
    for name in ("write_rejects", "write_index", "write_manifest"):
        setattr(job, name, timed(getattr(job, name), seconds.append))
    job.InvertActor = TimedActor
    job.invert(options_of(work, out, device))
    return sum(seconds)


def measured(program: str, work: Path, device: str) -> dict[str, float]:
    """Run a program in this process; returns its seconds, in total and by kind of work, after the first unit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        began = now()
        finishing = {"actor": run_actor, "job": run_job}[program](work, out, device)
        whole = now() - began
        first, *rest = [json.loads(line) for line in (out / "units.jsonl").read_text().splitlines()]
    found = {name: sum(unit[name] for unit in rest) for name in rest[0] if name != "end"}
    clock = rest[-1]["end"] - first["end"] + finishing
    return {"clock": clock, **found, "index and manifest": finishing, "whole": whole}


# Inputs


def make_inputs(work: Path, count: int) -> None:
    """Write pairs of rendered scenes in Pick-a-Pic columns, and a table of arbitrary scores."""
    stream, scenes = np.random.default_rng(0), all_scenes()
    rows = []
    for number in range(count):
        scene = scenes[number % len(scenes)]
        images = [_jpeg(render(scene, random_centre(scene, stream))) for _ in range(2)]
        rows.append(
            {"ranking_id": number, "caption": scene.caption, "jpg_0": images[0], "jpg_1": images[1], "label_0": 1.0}
        )
    pq.write_table(pa.Table.from_pylist(rows), work / "pairs.parquet", row_group_size=PAIRS_A_UNIT)
    make_scores(work / "scores", [row["caption"] for row in rows])


def make_scores(path: Path, prompts: Sequence[str]) -> None:
    """Write arbitrary scores for pairs of these prompts, whose ids are their numbers."""
    made_up = {"label": 1.0, "pickscore_0": 0.21, "pickscore_1": 0.2}
    scores = [{"pair_id": str(number), "prompt": prompt, **made_up} for number, prompt in enumerate(prompts)]
    path.mkdir(parents=True)
    part = write_part(path / "scores.parquet", scores, ["pickscore"])
    statistics = RewardStatistics(
        model="none", fingerprint="none", unit="none", min=0.2, max=0.21, mean=0.2, std=0.01, agreement=None,
        num_labelled=0,
    )  # fmt: skip
    info = ScoresInfo(
        schema_version=SCORES_VERSION, rewards={"pickscore": statistics}, parts=[part], scored=len(scores), rejected=0
    )
    write_scores_info(path, info)


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def measure(program: str, work: Path, device: str) -> dict[str, float]:
    """Run a program in a separate process."""
    command = [sys.executable, "-m", __spec__.name, "--measure", program, "--work", str(work), "--device", device]
    # Ray makes its workers nice; beside other work, the job would then be compared to a loop that is not.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(program, json.dumps(found), flush=True)
    return found


# The page


def page(turns: list[dict[str, dict[str, float]]], device: str) -> str:
    """Make the section."""
    pairs = PAIRS_A_UNIT * (UNITS - 1)

    def spread(program: str, value: Callable[[Mapping[str, float]], float], digits: int = 3) -> str:
        values = sorted(value(turn[program]) for turn in turns)
        return f"{median(values):.{digits}f} ({values[0]:.{digits}f} .. {values[-1]:.{digits}f})"

    def share(name: str) -> Callable[[Mapping[str, float]], float]:
        return lambda found: found[name] / found["clock"]

    named = ("denoiser", "VAE", "text encoder", "index and manifest")

    def rest(found: Mapping[str, float]) -> float:
        return 1 - sum(found[name] for name in named) / found["clock"]

    lines = [f"| {name} | {spread('actor', share(name))} | {spread('job', share(name))} |" for name in named]
    wanted = "; ".join(f"{program} {target}" for program, target in TARGETS.items())
    rates = ", ".join(f"{program} {spread(program, lambda found: pairs / found['clock'], 2)}" for program in TARGETS)
    libraries = ("torch", "diffusers", "transformers", "ray")
    return f"""{stamp(f"python -m benchmarks.speed.invert --device {device}", libraries, device=device)}

The embedded world's model and images ({SIDE} pixels) in float32, with batches of {BATCH} trajectories, {UNITS} units of
{PAIRS_A_UNIT} pairs, one actor and default settings: {FORWARDS_A_PAIR} forward passes of one image per pair, and those
that measure health on a part of them (the reference's forward passes count as the denoiser's). Shares are of the
wall-clock time from the end of the first unit to the end of the last; for the job they include writing the index and
the manifest. They exclude imports, loading and fingerprinting the model, Ray's start and end, and the first unit.
Values are medians of {len(turns)} turns, with the smallest and the largest in brackets. Targets for the denoiser: at
least {wanted}.

| share of the time | actor's loop, no Ray | whole Ray job |
|---|---|---|
{chr(10).join(lines)}
| the rest | {spread("actor", rest)} | {spread("job", rest)} |

Pairs per second in that time: {rates}.
The whole job's command takes {spread("job", lambda found: found["whole"], 0)} s.
"""


def main() -> None:
    """Run all programs, or the one that --measure names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure, arguments.work, arguments.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), PAIRS_A_UNIT * UNITS)
        turns = [
            {program: measure(program, Path(folder), arguments.device) for program in TARGETS}
            for _ in range(arguments.turns)
        ]
    write_section("Inversion" + (" on a GPU" if arguments.device == "cuda" else ""), page(turns, arguments.device))


if __name__ == "__main__":
    main()
