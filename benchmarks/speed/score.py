"""Measure the speed and memory of `smpo-pipeline score`; writes a section of docs/results/benchmarks.md.

Measures images per second of the job, of the published loops over the same model, and of a bare loop over our scorer
on decoded batches (the difference is Ray's cost); the cost of a second reward; and peak memory at ten times the data
behind a slow reward. Programs run in turns, each in a separate process; ratios are medians over turns.

    python -m benchmarks.speed.score [--turns N]

About 45 minutes per turn on two cores. An interrupted run continues with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from pydantic import BaseModel

from benchmarks.page import stamp, write_section
from benchmarks.speed import score_programs
from benchmarks.speed.score_programs import BATCH, SLEEP, TOY, Cost, make_pairs, make_vit_b
from smpo_common.files import write_bytes

PROGRAMS = ("-m", score_programs.__name__)
CORES = os.cpu_count() or 1
MEMORY_PAIRS, MEMORY_SIDE = 300, 1024


@dataclass(frozen=True)
class Size:
    """Two reward models, the images, and how many pairs each program gets.

    Attributes:
        pairs: file of pairs.
        warm: of the job's run that is taken off the long one, enough that it starts all workers.
        long: of the job's run.
        bare: of the bare loop.
        few: of the published loops.
        dtype: of the job and the bare loop; the published ones know none.
    """

    name: str
    models: tuple[Path, Path]
    pairs: Path
    warm: int
    long: int
    bare: int
    few: int
    dtype: str = "fp32"


SINGLE, PAIR, BARE, DECODING, JOB = "one image", "a pair", "bare loop", "bare loop, decoding", "job"
PRODUCTS = "products"
SECOND, BARE_SECOND = "second reward", "its bare loop"


class Results(BaseModel):
    """What was measured: by model size its turns and pairs; by number of pairs, peak memory in MB and seconds."""

    turns: dict[str, list[dict[str, Cost]]] = {}
    counts: dict[str, tuple[int, int, int, int]] = {}
    memory: dict[int, tuple[float, float]] = {}


def measure(kind: str, *arguments: object, threads: int = CORES) -> Cost:
    """Run one of the programs in a separate process."""
    command = [sys.executable, *PROGRAMS, kind, *map(str, arguments)]
    # Ray lowers its workers' priority; on a shared machine the loops would have an advantage.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    cost = Cost(*json.loads(done.stdout.strip().splitlines()[-1]))
    print(kind, *arguments[1:], f"on {threads} threads: {cost}", flush=True)
    return cost


def measure_loop(kind: str, *arguments: object) -> Cost:
    """Cost of a loop on all cores or on one, the smaller: on a shared machine, threads wait for each other."""
    costs = [measure(kind, *arguments, threads=threads) for threads in sorted({CORES, 1})]
    return Cost(min(cost.clock for cost in costs), min(cost.cpu for cost in costs))


def peak_memory(*arguments: object) -> tuple[float, float]:
    """Peak proportional resident memory (MB) of a job's process tree, and its seconds."""
    command = [sys.executable, *PROGRAMS, *map(str, arguments)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.5):
                peak = max(peak, tree_memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        printed, _ = process.communicate()
        done.set()
        watcher.join()
        if process.returncode:
            raise SystemExit(f"{command} failed")
    return peak / 1e6, json.loads(printed.strip().splitlines()[-1])[0]


def tree_memory(pid: int) -> int:
    """Memory of a process and its children in bytes; shared pages (Ray's object store) are counted once."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total


def turn(size: Size) -> dict[str, Cost]:
    """Measure one turn: the cost per pair, and of Ray's start with all imports and one pair."""
    first, second = f"pickscore={size.models[0]}", f"clipscore={size.models[1]}"

    def job_each(*specs: str) -> Cost:
        warm = measure("job", size.pairs, size.warm, size.dtype, *specs)
        return measure("job", size.pairs, size.long, size.dtype, *specs).less(warm).each(size.long - size.warm)

    def published(images_at_once: int) -> Cost:
        return measure_loop("published", size.pairs, size.models[0], size.few, images_at_once).each(size.few)

    def ours(kind: str, spec: str) -> Cost:
        return measure_loop(kind, size.pairs, spec, size.bare, size.dtype).each(size.bare)

    # The main baseline runs before and after the job, since the machine's speed changes within minutes.
    single, bare = published(1), ours("bare", first)
    one = job_each(first)
    return {
        SINGLE: published(1).mean(single),
        BARE: ours("bare", first).mean(bare),
        PAIR: published(2),
        DECODING: ours("decoding", first),
        "start": measure("job", size.pairs, 1, size.dtype, first),
        BARE_SECOND: ours("bare", second),
        PRODUCTS: measure_loop("products", size.pairs, first, size.bare).each(size.bare),
        JOB: one,
        SECOND: job_each(first, second).less(one),
    }


def rates(name: str, turns: Sequence[dict[str, Cost]]) -> str:
    """Make a row of the first table: images per second."""
    costs = [median(each[key].clock for each in turns) for key in (SINGLE, PAIR, BARE, DECODING, JOB, PRODUCTS)]
    cells = [f"{2 / cost:.1f}" if cost > 0 else "lost in noise" for cost in costs]
    start = median(each["start"].clock for each in turns)
    return f"| {name} | {len(turns)} | {' | '.join(cells)} | {start:.1f} |"


def ratios(name: str, turns: Sequence[dict[str, Cost]]) -> str:
    """Make two rows of the second table: medians, and with several turns the smallest and largest."""
    lines = []
    for place, kind in enumerate(("clock", "CPU")):
        cells = []
        for above, below in (
            *((loop, JOB) for loop in (SINGLE, PAIR, BARE, DECODING)),
            (SECOND, BARE_SECOND),
            (SINGLE, PRODUCTS),
        ):
            # A job that took no longer than its start: on a busy machine the time of short runs is noise.
            values = sorted(each[above][place] / each[below][place] for each in turns if each[below][place] > 0)
            spread = f" ({values[0]:.2f} .. {values[-1]:.2f})" if len(values) > 1 else ""
            cells.append(f"{median(values):.2f}{spread}" if values else "lost in noise")
        lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drift(results: Results) -> float:
    """How many times as long the bare loop took in one turn as in another, at most."""
    seconds = [[each[BARE].clock for each in turns] for turns in results.turns.values()]
    return max(max(each) / min(each) for each in seconds)


def page(results: Results) -> str:
    """Make the section."""
    counts = "; ".join(f"{name} {', '.join(map(str, each))}" for name, each in results.counts.items())
    memory, turns = results.memory, max(map(len, results.turns.values()))
    command = f"python -m benchmarks.speed.score --turns {turns}"
    return f"""{stamp(command, ("torch", "transformers", "ray", "pyarrow", "pillow"))}

The machine's own speed varies, and the ratios with it: the same bare loop took up to {drift(results):.1f} times as long
in one turn as in another. Values are medians of the turns, with the smallest and the largest in brackets. CPU seconds
count all processes, Ray's own included. Loops ran on all cores and on one core, and the better result is listed. Ray's
workers had the same priority as the loops.

All run in float32, except where bf16 is named (the published loop then stays in float32), with batches of {BATCH} and
JPEGs of 512 x 512. "toy" is the embedded world's PickScore, also on images of that world's own size, 32 x 32. ViT-B/32
is a random CLIP of that shape, at 224 pixels. In "rankings" all six pairs of four images per prompt follow each other;
otherwise each image is in one pair. Pairs per turn, for the job (two runs, of which the difference counts), the loops
over our scorer, and the published loops: {counts}.

Images per second, two for each pair. Start-up is the time that the same command takes for one pair (imports, Ray's
start, loading the weights twice); the other columns exclude it:

| model | turns | one image at a time | a pair at a time | bare loop | decoding too | our job | products | start-up, s |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rates(name, found) for name, found in results.turns.items())}

The published loop (one image or one pair at a time) decodes, preprocesses, and encodes text and image in sequence. The
bare loop calls our scorer on images that are decoded already, each once; "decoding too" decodes them in the same
process. The job decodes in processes that a bad file may crash, hashes the images, and writes the table. "Products" is
the same number of multiplications as in our scorer, in large matrix products.

Speed of the job divided by that of the loops (targets: 3 for the published loop, 0.9 for the bare one), and the time
that a second reward of the same size adds to the job, divided by that of its bare loop (target: at most 1.1). The last
column is how much faster than the published loop the matrix products alone are, in float32:

| model | by | one image at a time | a pair at a time | bare loop | decoding too | second reward | products |
|---|---|---|---|---|---|---|---|
{chr(10).join(ratios(name, found) for name, found in results.turns.items())}

The job decodes on the cores that the bare loop has for itself, so with a small model it cannot keep up with that loop,
whatever Ray costs. "Decoding too" shows the cost of Ray, of separate processes for files, and of the table. The cost of
a second reward is a difference of four runs. Nothing here was measured on a GPU or with a model of ViT-H/14's size.

{memory_section(memory)}"""


def memory_section(memory: dict[int, tuple[float, float]]) -> str:
    """Make the part on memory; ``memory`` has peaks in MB and seconds, by number of pairs."""
    lines = [
        f"| {count} | {count * 2 * MEMORY_SIDE**2 * 3 / 1e9:.1f} | {peak / 1e3:.2f} | {seconds:.0f} |"
        for count, (peak, seconds) in memory.items()
    ]
    growth = memory[max(memory)][0] / memory[min(memory)][0] - 1
    return f"""### Memory behind a slow reward

Two actors stand in for rewards: the first does nothing, the second sleeps {SLEEP * 1e3:.0f} ms per image. Images are
JPEGs of {MEMORY_SIDE} x {MEMORY_SIDE}. The peak is of the proportional resident memory of all processes (Ray's own,
workers, actors, object store), sampled twice a second:

| pairs | decoded, GB | peak, GB | seconds |
|---|---|---|---|
{chr(10).join(lines)}

Ten times the data changes the peak by {100 * growth:+.0f} %.
"""


def main() -> None:
    """Measure what is missing and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("demo/benchmark-score"), help="folder for inputs and results")
    arguments = parser.parse_args()
    results = collect(arguments.work, arguments.turns)
    write_section("Scoring", page(results))


def collect(work: Path, turns: int) -> Results:
    """Measure what is not yet in ``results.json``."""
    work.mkdir(parents=True, exist_ok=True)

    def pairs_of(count: int, side: int, images: int) -> Path:
        return made(work / f"pairs-{side}-{images}.parquet", lambda path: make_pairs(path, count, side, images))

    toys = (TOY, TOY.parent / "clipscore")
    vit = [made(work / f"vit-b-{seed}", lambda path, seed=seed: make_vit_b(path, seed)) for seed in (0, 1)]
    vits = (vit[0], vit[1])
    large, small, ranked = pairs_of(3072, 512, 2), pairs_of(8192, 32, 2), pairs_of(3072, 512, 4)
    sizes = [
        Size("toy, own size", toys, small, warm=2048, long=8192, bare=400, few=128),
        Size("ViT-B/32", vits, large, warm=512, long=1024, bare=64, few=24),
        Size("toy", toys, large, warm=1024, long=3072, bare=200, few=64),
        Size("ViT-B/32, rankings", vits, ranked, warm=512, long=1536, bare=96, few=24),
        Size("ViT-B/32, bf16", vits, large, warm=512, long=1024, bare=64, few=24, dtype="bf16"),
        Size("toy, rankings", toys, ranked, warm=1024, long=3072, bare=300, few=64),
    ]
    file = work / "results.json"
    found = Results.model_validate_json(file.read_bytes()) if file.is_file() else Results()
    for number in range(turns):
        for size in sizes:
            if len(found.turns.setdefault(size.name, [])) <= number:
                found.counts[size.name] = (size.warm, size.long, size.bare, size.few)
                found.turns[size.name].append(turn(size))
                write_bytes(file, found.model_dump_json().encode())
    first = made(work / "large-00.parquet", lambda path: make_pairs(path, MEMORY_PAIRS // 2, MEMORY_SIDE))
    links = [work / f"large-{number:02d}.parquet" for number in range(1, 20)]
    many = [first, *(made(link, lambda path: path.hardlink_to(first)) for link in links)]
    for files in (2, 20):
        count = files * MEMORY_PAIRS // 2
        if count not in found.memory:
            rewards = (f"pickscore={TOY}", f"clipscore={TOY.parent / 'clipscore'}")
            found.memory[count] = peak_memory("slow", ",".join(map(str, many[:files])), count, "fp32", *rewards)
            write_bytes(file, found.model_dump_json().encode())
    return found


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """Return the path, after making it if it is missing."""
    if not path.exists():
        make(path)
    return path


if __name__ == "__main__":
    main()
