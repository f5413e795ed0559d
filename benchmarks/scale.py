"""How the jobs grow: with workers, and with the size of the input. Writes three sections of docs/benchmarks.md.

- Workers: `invert` with a stand-in for the model that takes a fixed time for a batch, by 1, 2, 4 and 8 actors of a
  simulated cluster with a worker node for each: pairs a second from the end of the first unit of each actor on.
  Everything else is the job as it is. What Ray costs over a bare loop is in benchmarks/invert.py (actor and job).
- Memory: peak memory of the driver, of all workers and of Ray's object store while `score` and `invert` go through
  2,000, 20,000 and 200,000 pairs of small images, with stand-ins for the models that cost nothing.
- A hundred million pairs: what such a run holds, reckoned.

    python benchmarks/scale.py [--pairs 2000 20000 200000]

Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from invert import make_inputs
from page import stamp, write_section
from ray.cluster_utils import Cluster
from score_programs import make_pairs

import smpo_pipeline.jobs.invert.job as invert_job
import smpo_pipeline.jobs.score.job as score_job
from smpo_models.loading import load_family
from smpo_pipeline.inversion.batch import PreparedPair, draw_trajectory
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.isolation import Failure
from smpo_pipeline.jobs.invert.actor import InvertActor, InvertOptions
from smpo_pipeline.jobs.prepare import values_of
from smpo_pipeline.jobs.record.run_record import SCORE_ROWS, UnitRecord
from smpo_pipeline.jobs.score.chunks import with_scores, without_images
from smpo_pipeline.jobs.score.table import _UNITS_PER_PART
from smpo_pipeline.jobs.score.units import RewardActor
from smpo_pipeline.planning.size import pairs_that_fit
from smpo_pipeline.toy.create import ASSETS
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import ShardEntry
from smpo_schemas.pairs import PairFile, slice_files
from smpo_schemas.rejects import Reject
from smpo_schemas.scores import IMAGE_IDS, score_schema
from smpo_schemas.shards.samples import Sample

WORKERS = (1, 2, 4, 8)
SECONDS = 1.0
"""That a unit of PAIRS_A_UNIT pairs takes, where workers are measured."""

NODE = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False}

PAIRS_A_UNIT, UNITS_A_WORKER = 16, 6
FILE_PAIRS = 2000
MANY, FILES, GIGABYTE = 100_000_000, 10_000, 10**9


# The measured programs


class StandIn:
    """In place of the inverter: sleeps, and gives samples of the right shapes."""

    def __init__(self, actor: InvertActor, seconds: float) -> None:
        self._seconds = seconds
        self._family, self._options = actor._family, actor._options  # noqa: SLF001  (stands in its place)

    def invert(self, requests: Sequence[tuple[PreparedPair, int]]) -> tuple[list[Sample | Failure], HealthSums]:
        """A batch."""
        time.sleep(self._seconds * len(requests) / PAIRS_A_UNIT)
        return [self._sample(pair, number) for pair, number in requests], HealthSums()

    def _sample(self, pair: PreparedPair, number: int) -> Sample:
        settings = self._options.settings
        trajectory = draw_trajectory(pair, number, self._family, settings, self._options.seed)
        latent, states = self._family.latent_shape(*pair.image_size), len(trajectory.plan.stored)
        return Sample(
            trajectory.meta(),
            torch.zeros(2, *latent, dtype=torch.float16),
            torch.zeros(states, 2, *latent, dtype=torch.float16),
            torch.tensor(trajectory.plan.used_at),
            torch.zeros(states, 2),
            torch.zeros(states, 2),
        )


class FixedTimeActor(InvertActor):
    """The actor with the stand-in; notes when each unit ended."""

    def __init__(self, options: InvertOptions, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(options, **kwargs)
        self._inverter = StandIn(self, SECONDS)
        self._notes = options.out.parent / "units.jsonl"

    def __call__(self, row: pa.Table) -> pa.Table:
        """Commit one unit."""
        record = super().__call__(row)
        with self._notes.open("a") as file:
            print(json.dumps([os.getpid(), time.time()]), file=file)
        return record


class FreeInvertActor(InvertActor):
    """The actor with a stand-in that takes no time."""

    def __init__(self, options: InvertOptions, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(options, **kwargs)
        self._inverter = StandIn(self, 0.0)


class FreeActor(RewardActor):
    """In place of a reward: all images score 0."""

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Score a chunk."""
        return without_images(with_scores(chunk, {self._reward.name: np.zeros(len(values_of(chunk, "height")))}, {}))


def invert_options(work: Path, out: Path, pairs: Sequence[Path], limit: int, **more: Any) -> InvertOptions:  # noqa: ANN401
    """What `invert` is told."""
    return InvertOptions(
        pairs=list(pairs), scores=work / "scores", model=str(ASSETS / "model"), out=out / "shards", unet=None,
        inverting_unet=None, vae=None, resolution=None, settings=InversionSettings(), columns={}, seed=0,
        shard_bytes=None,
        device="cpu", limit=limit, max_reject_rate=0.0, overwrite=False, **more,
    )  # fmt: skip


def run_workers(work: Path, workers: int) -> None:
    """`invert` by this many actors; prints pairs a second."""
    invert_job.InvertActor = FixedTimeActor
    units = workers * UNITS_A_WORKER
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    for _ in range(workers):
        cluster.add_node(**NODE)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        sizes = {"pairs_per_shard": PAIRS_A_UNIT, "batch_size": PAIRS_A_UNIT}
        cluster_flags = {"concurrency": workers, "ray_address": cluster.address}
        limit = units * PAIRS_A_UNIT
        invert_job.invert(invert_options(work, out, [work / "pairs.parquet"], limit, **sizes, **cluster_flags))
        notes = [json.loads(line) for line in (out / "units.jsonl").read_text().splitlines()]
    cluster.shutdown()
    began = {}
    for process, end in notes:
        began.setdefault(process, end)
    start = max(began.values())
    counted = [end for _, end in notes if end > start]
    print(json.dumps(PAIRS_A_UNIT * len(counted) / (max(counted) - start)))


def run_invert_memory(work: Path, pairs: int) -> None:
    """`invert` over this many pairs."""
    invert_job.InvertActor = FreeInvertActor
    files = _files(work, "invert", pairs)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"pairs_per_shard": 128, "batch_size": 16, "concurrency": 1, "ray_address": None}
        invert_job.invert(invert_options(work, Path(folder), files, pairs, **flags))


def _files(work: Path, job: str, pairs: int) -> list[Path]:
    return [work / f"{job}-{number:03d}.parquet" for number in range(max(1, pairs // FILE_PAIRS))]


def run_score_memory(work: Path, pairs: int) -> None:
    """`score` over this many pairs."""
    score_job.RewardActor = FreeActor
    files = _files(work, "score", pairs)
    with tempfile.TemporaryDirectory() as folder:
        score_job.score(
            score_job.ScoreOptions(
                pairs=files,
                out=Path(folder) / "scores",
                reward=[f"pickscore={ASSETS / 'rewards/pickscore'}"],
                columns={},
                batch_size=None,
                device="cpu",
                dtype="fp32",
                concurrency=[],
                ray_address=None,
                limit=pairs,
                max_reject_rate=0.0,
                overwrite=False,
            )
        )


PROGRAMS = {"workers": run_workers, "score memory": run_score_memory, "invert memory": run_invert_memory}


# Measuring


def start(program: str, work: Path, number: int) -> subprocess.Popen[str]:
    """A program in a process of its own."""
    command = [sys.executable, __file__, "--measure", program, "--work", str(work), "--number", str(number)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def rate(work: Path, workers: int) -> float:
    """Pairs a second."""
    with start("workers", work, workers) as process:
        printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{workers} workers failed")
    found = json.loads(printed.strip().splitlines()[-1])
    print("workers", workers, found, flush=True)
    return float(found)


def peaks(work: Path, job: str, pairs: int) -> dict[str, float]:
    """Peak MB of the driver, of the workers together, and of what they share (the object store); and seconds."""
    found = dict.fromkeys(("driver", "workers", "shared"), 0.0)
    began, done = time.perf_counter(), threading.Event()
    with start(f"{job} memory", work, pairs) as process:

        def watch() -> None:
            while not done.wait(0.5):
                for name, size in memory_now(process.pid).items():
                    found[name] = max(found[name], size / 1e6)

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.communicate()
        done.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{job} of {pairs} pairs failed")
    found["seconds"] = time.perf_counter() - began
    print(job, "memory", pairs, found, flush=True)
    return found


def memory_now(pid: int) -> dict[str, int]:
    """Bytes of the driver and of all that it started, shared memory counted apart."""
    found = dict.fromkeys(("driver", "workers", "shared"), 0)
    try:
        driver = psutil.Process(pid)
        processes = [driver, *driver.children(recursive=True)]
    except psutil.Error:
        return found
    for process in processes:
        try:
            used = process.memory_info()
        except psutil.Error:
            continue
        found["driver" if process.pid == pid else "workers"] += used.rss - used.shared
        # Everybody maps the same object store: the largest share is that of its owner.
        found["shared"] = max(found["shared"], used.shared)
    return found


# The pages


def workers_page(rates: dict[int, float]) -> Iterator[str]:
    """The section's text."""
    yield stamp("python benchmarks/scale.py", ("ray", "pyarrow"))
    yield ""
    yield f"`invert` with a stand-in for the model that sleeps {SECONDS:g} s for a unit of {PAIRS_A_UNIT} pairs, by"
    yield "several actors of a simulated cluster (a head and a worker node for each actor, all on these cores);"
    yield "reading, decoding, drawing, writing and committing are real."
    yield f"Pairs a second once every actor has finished its first unit; {UNITS_A_WORKER} units an actor, one run each;"
    yield "wanted: 0.9 of the pace."
    yield ""
    yield "| actors | pairs/s | of the actors' own pace |"
    yield "| --- | --- | --- |"
    for workers, found in rates.items():
        yield f"| {workers} | {found:.1f} | {found * SECONDS / PAIRS_A_UNIT / workers:.2f} |"


def memory_page(found: dict[tuple[str, int], dict[str, float]]) -> Iterator[str]:
    """The section's text."""
    pairs = dict.fromkeys(pairs for _, pairs in found)
    yield stamp(f"python benchmarks/scale.py --pairs {' '.join(map(str, pairs))}", ("ray", "pyarrow"))
    yield ""
    yield "`score` over pairs of 64 x 64 JPEGs and `invert` over pairs of 32 x 32, with stand-ins for the models that"
    yield "cost nothing. Peaks in MB, looked at twice a second: resident memory of the driver and of all other"
    yield "processes (Ray's own included) without shared pages, and the largest shared part of a"
    yield "process, which is the object store's. Other work may run beside it: the seconds say little."
    yield ""
    yield "| job | pairs | driver | workers and Ray | shared | seconds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (job, pairs), each in found.items():
        sizes = " | ".join(f"{each[name]:.0f}" for name in ("driver", "workers", "shared", "seconds"))
        yield f"| {job} | {pairs:,} | {sizes} |"
    yield ""
    yield f"`score` writes its table {_UNITS_PER_PART * SCORE_ROWS:,} rows at a time, which its driver holds while it"
    yield "does: more than the first two sizes have. What else grows with the input is in the account below."


def account_page() -> Iterator[str]:
    """The section's text: what a run over very many pairs holds, by formula and by the size of the real things."""
    process = load_family(str(ASSETS / "model")).process
    shapes = {"SD 1.5, 512 pixels": (4, 64, 64), "SDXL, 1024 pixels": (4, 128, 128)}
    fitting = {name: pairs_that_fit(GIGABYTE, latent, InversionSettings(), process) for name, latent in shapes.items()}
    shards = {name: math.ceil(MANY / pairs) for name, pairs in fitting.items()}
    entry = ShardEntry(name="shard-000000.tar", pairs=1500, samples=1500, states=13500, bytes=GIGABYTE, sha256="0" * 64)
    record = UnitRecord(
        unit=1, pairs_in=1500, pairs=1500, rejects=[], entry=entry.model_dump(), health=HealthSums().to_lists()
    )
    files = [PairFile(Path(f"/data/pairs/part-{number:05d}.parquet"), MANY // FILES, 0, "") for number in range(FILES)]
    rows = {"pair_id": "0" * 36, "prompt": "x" * 80, "label": 1.0, "annotator": "0" * 8}
    rows |= dict.fromkeys(IMAGE_IDS, "0" * 32) | dict.fromkeys(("a_0", "a_1", "b_0", "b_1"), 0.5)
    table = pa.Table.from_pylist([rows] * 1000, schema=score_schema(["a", "b"]))
    held = table.select(["pair_id", "prompt", *IMAGE_IDS, "a_0", "a_1", "b_0", "b_1"]).nbytes / 1000
    as_object = held_bytes(lambda: UnitRecord.model_validate_json(record.model_dump_json()))
    yield stamp("python benchmarks/scale.py", ("torch", "pyarrow"))
    yield ""
    yield f"{MANY:,} pairs in {FILES:,} Parquet files, one trajectory a pair, every setting at its default but"
    yield "`--shard-size 1GB`; two rewards, ids of 36 and prompts of 80 characters. By formula, and by the size of one"
    yield "real thing of each kind; nothing of this size was run."
    yield ""
    yield f"| | {' | '.join(shapes)} |"
    yield "| --- | --- | --- |"

    def line(what: str, values: Iterable[str]) -> str:
        return f"| {what} | {' | '.join(values)} |"

    yield line("pairs a shard", (f"{each:,}" for each in fitting.values()))
    yield line("shards: units of work, objects in the output", (f"{each:,}" for each in shards.values()))
    yield line("all shards, TB", (f"{each * GIGABYTE / 1e12:.0f}" for each in shards.values()))
    size = len(record.model_dump_json())
    yield line(
        f"records of an unfinished run ({size} bytes each), MB",
        (f"{each * size / 1e6:.0f}" for each in shards.values()),
    )
    yield line(
        f"records that the driver holds ({as_object:,.0f} bytes each), GB",
        (f"{each * as_object / 1e9:.1f}" for each in shards.values()),
    )
    pickled = (len(pickle.dumps(slice_files(files, each))) for each in fitting.values())
    yield line("the list of units that each task is given, MB", (f"{each / 1e6:.1f}" for each in pickled))
    manifest = len(entry.model_dump_json())
    yield line("manifest, MB", (f"{each * manifest / 1e6:.0f}" for each in shards.values()))
    yield line("scores that `invert` holds in memory on each node, GB", [f"{MANY * held / 1e9:.0f}"] * len(shapes))
    units = math.ceil(MANY / SCORE_ROWS)
    yield line(f"units of `score` ({SCORE_ROWS} pairs), each two files while it runs", [f"{units:,}"] * len(shapes))
    scored = UnitRecord(
        unit=1, pairs_in=128, pairs=128, rejects=[], entry={"name": "units/0.parquet", "sha256": "0" * 64}
    )
    reject = Reject(pair_id="0" * 36, source="/data/pairs/part-00000.parquet:17", stage="score", reason="x" * 60)
    with_rejects = scored.model_copy(update={"rejects": [reject] * 10})
    plain, ten = (
        held_bytes(partial(UnitRecord.model_validate_json, each.model_dump_json())) for each in (scored, with_rejects)
    )
    what = f"records of `score` that the driver holds ({plain:,.0f} bytes each), GB"
    yield line(what, [f"{units * plain / 1e9:.1f}"] * len(shapes))
    yield line("each reject in a record that is held, bytes", [f"{(ten - plain) / 10:,.0f}"] * len(shapes))


def held_bytes(make: Callable[[], object]) -> float:
    """Bytes of Python's heap that one of the objects takes, of a thousand."""
    tracemalloc.start()
    kept = [make() for _ in range(1000)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(kept)


def main() -> None:
    """Run everything, or one program where --measure names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--measure", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        PROGRAMS[arguments.measure](arguments.work, arguments.number)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_inputs(work, FILE_PAIRS)
        rates = {workers: rate(work, workers) for workers in WORKERS}
        write_section("Workers", "\n".join(workers_page(rates)))
        sources = {"score": make_pairs(work / "64.parquet", FILE_PAIRS, 64), "invert": work / "pairs.parquet"}
        runs = [(job, pairs) for job in sources for pairs in arguments.pairs]
        for job, source in sources.items():
            for file in _files(work, job, max(arguments.pairs)):
                file.hardlink_to(source)
        found = {(job, pairs): peaks(work, job, pairs) for job, pairs in runs}
        write_section("Memory", "\n".join(memory_page(found)))
        write_section("A hundred million pairs", "\n".join(account_page()))


if __name__ == "__main__":
    main()
