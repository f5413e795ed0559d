"""Measure how jobs scale with workers and with the input; writes three sections of docs/results/benchmarks.md.

- Workers: `invert` with a stand-in for the model that takes a fixed time for a batch, by 1, 2, 4 and 8 actors of a
  simulated cluster with a worker node for each: pairs per second from the end of each actor's first unit.
  Everything else is the real job. benchmarks/speed/invert.py measures the cost of Ray over a bare loop.
- Memory: peak memory of the driver, of all workers and of Ray's object store while `score` and `invert` process
  2,000, 20,000 and 200,000 pairs of small images, with stand-ins for the models that cost nothing.
- A hundred million pairs: the size of what such a run holds, computed.

    python -m benchmarks.capacity.scale [--pairs 2000 20000 200000]

Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.capacity import scale_programs
from benchmarks.capacity.scale_account import account_page
from benchmarks.capacity.scale_programs import FILE_PAIRS, PAIRS_A_UNIT, SECONDS, UNITS_A_WORKER, input_files
from benchmarks.page import stamp, write_section
from benchmarks.speed.invert import make_inputs
from benchmarks.speed.score_programs import make_pairs
from smpo_pipeline.jobs.record.run_record import SCORE_ROWS
from smpo_pipeline.jobs.score.table import _UNITS_PER_PART

WORKERS = (1, 2, 4, 8)
PROGRAMS = ("-m", scale_programs.__name__)


# Measuring


def start(program: str, work: Path, number: int) -> subprocess.Popen[str]:
    """Start a program in a separate process."""
    command = [sys.executable, *PROGRAMS, program, str(work), str(number)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def rate(work: Path, workers: int) -> float:
    """Pairs per second."""
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
    """Memory of the driver and of all its child processes in bytes, with shared memory counted separately."""
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
        # All processes map the same object store; its owner has the largest share.
        found["shared"] = max(found["shared"], used.shared)
    return found


# The pages


def workers_page(rates: dict[int, float]) -> Iterator[str]:
    """The section's text."""
    yield stamp("python -m benchmarks.capacity.scale", ("ray", "pyarrow"))
    yield ""
    yield f"`invert` with a stand-in for the model that sleeps {SECONDS:g} s for a unit of {PAIRS_A_UNIT} pairs, by"
    yield "several actors of a simulated cluster (a head and a worker node per actor, all on these cores). Reading,"
    yield "decoding, random draws, writing and committing are real. Pairs per second are counted once every actor has"
    yield f"finished its first unit, over {UNITS_A_WORKER} units per actor, in one run each. Target: 0.9 of the actors'"
    yield "own pace."
    yield ""
    yield "| actors | pairs/s | of the actors' own pace |"
    yield "| --- | --- | --- |"
    for workers, found in rates.items():
        yield f"| {workers} | {found:.1f} | {found * SECONDS / PAIRS_A_UNIT / workers:.2f} |"


def memory_page(found: dict[tuple[str, int], dict[str, float]]) -> Iterator[str]:
    """The section's text."""
    pairs = dict.fromkeys(pairs for _, pairs in found)
    yield stamp(f"python -m benchmarks.capacity.scale --pairs {' '.join(map(str, pairs))}", ("ray", "pyarrow"))
    yield ""
    yield "`score` over pairs of 64 x 64 JPEGs and `invert` over pairs of 32 x 32, with stand-ins for the models that"
    yield "cost nothing. Peaks are in MB, sampled twice a second: resident memory of the driver and of all other"
    yield "processes (Ray's own included) without shared pages, and the largest shared part of one process, which is"
    yield "the object store's. Other work may have run at the same time, so the seconds mean little."
    yield ""
    yield "| job | pairs | driver | workers and Ray | shared | seconds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (job, pairs), each in found.items():
        sizes = " | ".join(f"{each[name]:.0f}" for name in ("driver", "workers", "shared", "seconds"))
        yield f"| {job} | {pairs:,} | {sizes} |"
    yield ""
    yield f"`score` writes its table in parts of {_UNITS_PER_PART * SCORE_ROWS:,} rows, which its driver holds"
    yield "meanwhile: more rows than the first two sizes have. The section on a hundred million pairs lists what else"
    yield "grows with the input."


def main() -> None:
    """Run all measurements and write the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_inputs(work, FILE_PAIRS)
        rates = {workers: rate(work, workers) for workers in WORKERS}
        write_section("Workers", "\n".join(workers_page(rates)))
        sources = {"score": make_pairs(work / "64.parquet", FILE_PAIRS, 64), "invert": work / "pairs.parquet"}
        runs = [(job, pairs) for job in sources for pairs in arguments.pairs]
        for job, source in sources.items():
            for file in input_files(work, job, max(arguments.pairs)):
                file.hardlink_to(source)
        found = {(job, pairs): peaks(work, job, pairs) for job, pairs in runs}
        write_section("Memory", "\n".join(memory_page(found)))
        write_section("A hundred million pairs", "\n".join(account_page()))


if __name__ == "__main__":
    main()
