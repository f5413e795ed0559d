"""What `smpo-pipeline score` makes of a machine: writes its section of docs/benchmarks.md.

Images a second of the job, of the published one-at-a-time loops over the same model, and of a bare loop over our own
scorer on decoded batches (what Ray costs); what a second reward costs; and peak memory at ten times the data behind an
artificially slow reward. Everything is measured in turns, each in a process of its own; ratios are medians over turns.

    python benchmarks/score.py [--turns N]

About a quarter of an hour a turn on two cores. What was stopped goes on with what is missing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import NamedTuple, Self

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from page import stamp, write_section
from PIL import Image
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

import smpo_pipeline.jobs.score as job
from smpo_models.loading import DTYPES
from smpo_pipeline.images import decode_image
from smpo_pipeline.jobs.chunks import with_scores, without_images
from smpo_pipeline.jobs.prepare import values_of
from smpo_pipeline.jobs.score_units import RewardActor
from smpo_pipeline.rewards import load_reward
from smpo_schemas.files import write_bytes

ROOT = Path(__file__).parents[1]
TOY = ROOT / "pipeline/smpo_pipeline/toy/assets/rewards/pickscore"
CORES = os.cpu_count() or 1
BATCH = 32
SLEEP = 0.02
"""Seconds an image that the slow reward takes."""
MEMORY_PAIRS, MEMORY_SIDE = 300, 1024


# The measured programs


class Cost(NamedTuple):
    """Seconds by the clock, and of the CPU in this process and all it starts."""

    clock: float
    cpu: float

    def each(self, count: int) -> Cost:
        """For one of ``count``."""
        return Cost(self.clock / count, self.cpu / count)

    def less(self, other: Cost) -> Cost:
        """What it costs more than ``other``."""
        return Cost(self.clock - other.clock, self.cpu - other.cpu)


class Stopwatch:
    """Measures what happens inside; processes are looked at five times a second, since some are gone at the end."""

    cost: Cost

    def __enter__(self) -> Self:
        self._cpu: dict[int, float] = {}
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._start, self._start_cpu = time.perf_counter(), time.process_time()
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    used = child.cpu_times()
                    self._cpu[child.pid] = used.user + used.system

    def __exit__(self, *_error: object) -> None:
        own, clock = time.process_time() - self._start_cpu, time.perf_counter() - self._start
        self._done.set()
        self._watcher.join()
        self.cost = Cost(clock, own + sum(self._cpu.values()))


def rows_of(path: Path, count: int) -> list[dict[str, object]]:
    """The first pairs of the input."""
    return pq.read_table(path).slice(0, count).to_pylist()


def published_loop(pairs: Path, model: str, count: int, images_at_once: int) -> Cost:
    """Cost of the loop of the published scripts: decode, processor, text tower, image tower, cosine."""
    processor, clip = CLIPProcessor.from_pretrained(model), CLIPModel.from_pretrained(model).eval()
    limit = clip.config.text_config.max_position_embeddings
    rows = rows_of(pairs, count)

    @torch.no_grad()
    def score(row: dict[str, object], names: Iterable[str]) -> None:
        images = [Image.open(io.BytesIO(row[name])).convert("RGB") for name in names]
        pixels = processor.image_processor(images, return_tensors="pt")
        tokens = processor.tokenizer(
            row["caption"], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        image_ND = clip.get_image_features(**pixels).pooler_output
        text_1D = clip.get_text_features(**tokens).pooler_output
        (image_ND / image_ND.norm(dim=-1, keepdim=True) @ (text_1D / text_1D.norm()).T).tolist()

    names = ("jpg_0", "jpg_1")
    calls = [names] if images_at_once == 2 else [names[:1], names[1:]]
    score(rows[0], names)
    with Stopwatch() as watch:
        for row in rows:
            for call in calls:
                score(row, call)
    return watch.cost


def batches_of(pairs: Path, count: int) -> list[tuple[list[Image.Image], list[str]]]:
    """Decoded images, each once, and their prompts."""
    shown = dict.fromkeys((row[name], row["caption"]) for row in rows_of(pairs, count) for name in ("jpg_0", "jpg_1"))
    items = [(decode_image(data), caption) for data, caption in shown]
    return [tuple(map(list, zip(*items[start : start + BATCH], strict=True))) for start in range(0, len(items), BATCH)]


def bare_loop(pairs: Path, spec: str, count: int, dtype: str) -> Cost:
    """Cost of our scorer on ready batches."""
    reward, batches = load_reward(spec, "cpu"), batches_of(pairs, count)
    with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
        reward.score(*batches[0])
        with Stopwatch() as watch:
            for images, prompts in batches:
                reward.score(images, prompts)
    return watch.cost


def products(pairs: Path, spec: str, count: int) -> Cost:
    """Cost of as many multiplications as our scorer makes, in one large product of matrices after another."""
    reward = load_reward(spec, "cpu")
    with FlopCounterMode(display=False) as counter:
        for images, prompts in batches_of(pairs, count):
            reward.score(images, prompts)
    left, right = torch.randn(BATCH * 50, 768), torch.randn(768, 3072)
    each = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    rounds = 200
    left @ right
    with Stopwatch() as watch:
        for _ in range(rounds):
            left @ right
    share = counter.get_total_flops() / (rounds * each)
    return Cost(watch.cost.clock * share, watch.cost.cpu * share)


class SlowActor(RewardActor):
    """In place of rewards: the first one costs nothing, the last one takes its time."""

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Score all images alike."""
        num_images = len(values_of(chunk, "height"))
        if self._last:
            time.sleep(SLEEP * num_images)
        scored = with_scores(chunk, {self._reward.name: np.zeros(num_images)})
        return without_images(scored) if self._last else scored


def run_job(pairs: Sequence[Path], specs: Sequence[str], count: int, dtype: str, *, slow: bool = False) -> Cost:
    """Cost of the whole job, Ray's start included."""
    if slow:
        job.RewardActor = SlowActor
    with tempfile.TemporaryDirectory() as out:
        options = job.ScoreOptions(
            pairs=list(pairs),
            out=Path(out) / "scores",
            reward=list(specs),
            columns={},
            batch_size=BATCH,
            device="cpu",
            dtype=dtype,
            concurrency=[],
            ray_address=None,
            limit=count,
            max_reject_rate=0.05,
            overwrite=False,
        )
        with Stopwatch() as watch:
            job.score(options)
        return watch.cost


# Measuring


def measure(kind: str, *arguments: object, threads: int = CORES) -> Cost:
    """Run one of the programs in a process of its own."""
    command = [sys.executable, __file__, "--measure", kind, *map(str, arguments)]
    # Ray makes its workers nice; beside other work, they would then be compared to loops that are not.
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
    """Peak of proportional resident memory (MB) of a job's process tree, and its seconds."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
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
    """Bytes of a process and all it started; pages that they share (Ray's object store) are counted once."""
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


# Inputs


def make_pairs(path: Path, count: int, side: int, images_a_prompt: int = 2) -> Path:
    """Pick-a-Pic columns: all pairs of smooth random JPEGs, captions of the embedded world (10 to 14 tokens)."""
    generator = np.random.default_rng(0)
    colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        words = [f"a {generator.choice(colours)} {generator.choice(shapes)}" for _ in range(2)]
        images = []
        for _ in range(images_a_prompt):
            coarse = generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            images.append(buffer.getvalue())
        for first, second in combinations(images, 2):
            row = {"caption": " and ".join(words), "jpg_0": first, "jpg_1": second, "label_0": 1.0}
            rows.append({"ranking_id": len(rows), **row})
    pq.write_table(pa.Table.from_pylist(rows[:count]), path, row_group_size=100)
    return path


def make_vit_b(path: Path, seed: int) -> Path:
    """A random CLIP of ViT-B/32's shape (the default of transformers), 224 pixels, 77 tokens."""
    tokenizer = CLIPTokenizer.from_pretrained(TOY, model_max_length=77)
    config = CLIPConfig()
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.bos_token_id = tokenizer.bos_token_id
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil().save_pretrained(path)
    return path


# The page


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


SINGLE, PAIR, BARE, JOB, PRODUCTS = "one image", "a pair", "bare loop", "job", "products"
SECOND, BARE_SECOND = "second reward", "its bare loop"


class Results(BaseModel):
    """What was measured: by model size its turns and pairs; by number of pairs, peak memory in MB and seconds."""

    turns: dict[str, list[dict[str, Cost]]] = {}
    counts: dict[str, tuple[int, int, int, int]] = {}
    memory: dict[int, tuple[float, float]] = {}


def turn(size: Size) -> dict[str, Cost]:
    """Measure everything once: cost of a pair; and of Ray's start with all imports and one pair."""
    first, second = f"pickscore={size.models[0]}", f"clipscore={size.models[1]}"

    def job_each(*specs: str) -> Cost:
        warm = measure("job", size.pairs, size.warm, size.dtype, *specs)
        return measure("job", size.pairs, size.long, size.dtype, *specs).less(warm).each(size.long - size.warm)

    one, both = job_each(first), job_each(first, second)
    return {
        "start": measure("job", size.pairs, 1, size.dtype, first),
        SINGLE: measure_loop("published", size.pairs, size.models[0], size.few, 1).each(size.few),
        PAIR: measure_loop("published", size.pairs, size.models[0], size.few, 2).each(size.few),
        BARE: measure_loop("bare", size.pairs, first, size.bare, size.dtype).each(size.bare),
        BARE_SECOND: measure_loop("bare", size.pairs, second, size.bare, size.dtype).each(size.bare),
        PRODUCTS: measure_loop("products", size.pairs, first, size.bare).each(size.bare),
        JOB: one,
        SECOND: both.less(one),
    }


def rates(name: str, turns: Sequence[dict[str, Cost]]) -> str:
    """A line of the first table: images a second."""
    costs = [median(each[key].clock for each in turns) for key in (SINGLE, PAIR, BARE, JOB, PRODUCTS)]
    cells = [f"{2 / cost:.1f}" if cost > 0 else "lost in noise" for cost in costs]
    start = median(each["start"].clock for each in turns)
    return f"| {name} | {len(turns)} | {' | '.join(cells)} | {start:.1f} |"


def ratios(name: str, turns: Sequence[dict[str, Cost]]) -> str:
    """Two lines of the second table: medians, and the smallest and largest where there are several turns."""
    lines = []
    for place, kind in enumerate(("clock", "CPU")):
        cells = []
        for above, below in ((SINGLE, JOB), (PAIR, JOB), (BARE, JOB), (SECOND, BARE_SECOND), (SINGLE, PRODUCTS)):
            # A job that took no longer than its start: on a busy machine, the clock of short runs is noise.
            values = sorted(each[above][place] / each[below][place] for each in turns if each[below][place] > 0)
            spread = f" ({values[0]:.2f} .. {values[-1]:.2f})" if len(values) > 1 else ""
            cells.append(f"{median(values):.2f}{spread}" if values else "lost in noise")
        lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(results: Results) -> str:
    """The section of docs/benchmarks.md."""
    counts = "; ".join(f"{name} {', '.join(map(str, each))}" for name, each in results.counts.items())
    memory, turns = results.memory, max(map(len, results.turns.values()))
    lines = [
        f"| {count} | {count * 2 * MEMORY_SIDE**2 * 3 / 1e9:.1f} | {peak / 1e3:.2f} | {seconds:.0f} |"
        for count, (peak, seconds) in memory.items()
    ]
    growth = max(peak for peak, _ in memory.values()) / min(peak for peak, _ in memory.values()) - 1
    command = f"python benchmarks/score.py --turns {turns}"
    return f"""{stamp(command, ("torch", "transformers", "ray", "pyarrow", "pillow"))}

Nothing else of ours ran, but the machine's own speed changed by half within minutes, and with it ratios of what was
not measured in the same minute. Medians of the turns, smallest and largest in brackets; CPU seconds are those of all
processes, Ray's own included. Loops ran on all cores and on one; the better counts. Ray's workers had the loops'
priority.

Float32 but where `--dtype bf16` is named, which the published loop does not know; batches of {BATCH}; JPEGs of
512 x 512. The toy is the embedded world's PickScore, also on images of that world's own size, 32 x 32; ViT-B/32 is a
random CLIP of that shape, 224 pixels. Rankings: all six pairs of four images a prompt follow each other; else each
image is in one pair. Pairs a turn, for the job (two runs, the second less the first), the loops over our scorer, and
the published ones: {counts}.

Images a second, two for each pair; start-up: the seconds that the same command takes for one pair (imports, Ray's
start, loading the weights twice), which the others leave out:

| model | turns | one image at a time | a pair at a time | bare loop | our job | matrix products | start-up, s |
|---|---|---|---|---|---|---|---|
{chr(10).join(rates(name, found) for name, found in results.turns.items())}

The published loop (one image or a pair at a time) decodes, preprocesses, encodes text and image, one after another.
The bare loop calls our scorer on images that are decoded already, each once; the job also reads, decodes, hashes, and
writes the table. The last but one column is as many multiplications as our scorer makes, in one large product of
matrices after another.

Speed of the job over that of the loops (3 times the published one, 0.9 of the bare one are wanted), and what a second
reward of the same size adds to the job over its own bare loop (at most 1.1 is wanted). The last column is how much
faster than the published loop the matrix products alone are:

| model | by | over one image at a time | over a pair at a time | over the bare loop | second reward | bound |
|---|---|---|---|---|---|---|
{chr(10).join(ratios(name, found) for name, found in results.turns.items())}

Decoding and scaling cost the toy more than its model, so that its job cannot keep up with loops over decoded images.
What a second reward costs is the difference of four runs.

### Memory behind a slow reward

Two actors in place of rewards, the first of which costs nothing, the second sleeps {SLEEP * 1e3:.0f} ms an image;
{MEMORY_SIDE} x {MEMORY_SIDE} JPEGs. Peak of the proportional resident memory of all processes (Ray's own, workers,
actors, object store), sampled twice a second:

| pairs | decoded, GB | peak, GB | seconds |
|---|---|---|---|
{chr(10).join(lines)}

Ten times the data takes {100 * growth:.0f} % more memory.
"""


def main() -> None:
    """Run everything, or one program where --measure names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("demo/benchmark-score"), help="folder for inputs and results")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(run_program(*arguments.measure)))
        return
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
        Size("toy", toys, large, warm=1024, long=3072, bare=200, few=64),
        Size("toy, rankings", toys, ranked, warm=1024, long=3072, bare=300, few=64),
        Size("toy, own size", toys, small, warm=2048, long=8192, bare=400, few=128),
        Size("ViT-B/32", vits, large, warm=512, long=1024, bare=64, few=8),
        Size("ViT-B/32, rankings", vits, ranked, warm=512, long=1536, bare=96, few=8),
        Size("ViT-B/32, bf16", vits, large, warm=512, long=1536, bare=64, few=8, dtype="bf16"),
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
    """The path, made where it is missing."""
    if not path.exists():
        make(path)
    return path


def run_program(kind: str, pairs: str, *rest: str) -> Cost:
    """One of the measured programs, in this process."""
    if kind == "published":
        return published_loop(Path(pairs), rest[0], int(rest[1]), int(rest[2]))
    if kind == "bare":
        return bare_loop(Path(pairs), rest[0], int(rest[1]), rest[2])
    if kind == "products":
        return products(Path(pairs), rest[0], int(rest[1]))
    return run_job([Path(each) for each in pairs.split(",")], rest[2:], int(rest[0]), rest[1], slow=kind == "slow")


if __name__ == "__main__":
    main()
