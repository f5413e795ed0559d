"""What `smpo-pipeline score` makes of a machine: writes its section of docs/benchmarks.md.

Images a second of the job, of the published one-at-a-time loops over the same model, and of a bare loop over our own
scorer on decoded batches (what Ray costs); what a second reward costs; and peak memory at ten times the data behind an
artificially slow reward. Everything is measured in turns, each in a process of its own; ratios are medians over turns.

    python benchmarks/score.py [--turns N] [--skip-memory]

About twenty minutes on two cores.
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
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

import smpo_pipeline.jobs.score as job
from smpo_pipeline.images import decode_image
from smpo_pipeline.jobs.score_units import RewardActor
from smpo_pipeline.rewards import load_reward

ROOT = Path(__file__).parents[1]
TOY = ROOT / "pipeline/smpo_pipeline/toy/assets/rewards/pickscore"
CORES = os.cpu_count() or 1
BATCH = 32
SLEEP = 0.02
"""Seconds an image that the slow reward takes."""


# The measured programs


def rows_of(path: Path, count: int) -> list[dict[str, object]]:
    """The first pairs of the input."""
    return pq.read_table(path).slice(0, count).to_pylist()


def published_loop(pairs: Path, model: str, count: int, images_at_once: int) -> float:
    """Seconds for the loop of the published scripts: decode, processor, text tower, image tower, cosine."""
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
    start = time.perf_counter()
    for row in rows:
        for call in calls:
            score(row, call)
    return time.perf_counter() - start


def bare_loop(pairs: Path, spec: str, count: int) -> float:
    """Seconds for our scorer on decoded images, batch by batch."""
    reward = load_reward(spec, "cpu")
    items = [(decode_image(row[name]), row["caption"]) for row in rows_of(pairs, count) for name in ("jpg_0", "jpg_1")]
    batches = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    reward.score(*zip(*batches[0], strict=True))
    start = time.perf_counter()
    for batch in batches:
        reward.score(*zip(*batch, strict=True))
    return time.perf_counter() - start


class SlowActor(RewardActor):
    """Takes its time over the last reward of the chain."""

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Score, then sleep."""
        scored = super().__call__(chunk)
        if self._last:
            time.sleep(SLEEP * len(scored["score pickscore"].combine_chunks().flatten()))
        return scored


def run_job(pairs: Sequence[Path], specs: Sequence[str], count: int, *, slow: bool = False) -> float:
    """Seconds for the whole job, Ray's start included."""
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
            concurrency=[],
            ray_address=None,
            limit=count,
            overwrite=False,
        )
        start = time.perf_counter()
        job.score(options)
        return time.perf_counter() - start


# Measuring


def measure(kind: str, *arguments: object) -> float:
    """Run one of the programs in a process of its own, on all cores; returns its seconds."""
    command = [sys.executable, __file__, "--measure", kind, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.strip().splitlines()[-1])


def peak_memory(*arguments: object) -> tuple[float, float]:
    """Peak of proportional resident memory (MB) of a job's process tree, and its seconds."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
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
    return peak / 1e6, float(printed.strip().splitlines()[-1])


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


def make_pairs(path: Path, count: int, side: int) -> Path:
    """Pick-a-Pic columns: smooth random JPEGs, captions of the embedded world (10 to 14 tokens)."""
    generator = np.random.default_rng(0)
    colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
    rows = []
    for number in range(count):
        words = [f"a {generator.choice(colours)} {generator.choice(shapes)}" for _ in range(2)]
        images = []
        for _ in range(2):
            coarse = generator.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            images.append(buffer.getvalue())
        rows.append(
            {
                "ranking_id": number,
                "caption": " and ".join(words),
                "jpg_0": images[0],
                "jpg_1": images[1],
                "label_0": 1.0,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
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


def throughput(name: str, pairs: Path, models: Sequence[Path], count: int, few: int, turns: int) -> list[str]:
    """Rows of the table for one model size: medians of images a second, and of the ratios within a turn."""
    first, second = f"pickscore={models[0]}", f"clipscore={models[1]}"
    results: list[dict[str, float]] = []
    for turn in range(turns):
        start = measure("job", pairs, 1, first)
        one = measure("job", pairs, count, first)
        both = measure("job", pairs, count, first, second)
        seconds = {
            "start": start,
            "published, one image at a time": measure("published", pairs, models[0], few, 1) / few,
            "published, a pair at a time": measure("published", pairs, models[0], few, 2) / few,
            "bare loop": measure("bare", pairs, first, count) / count,
            "job": (one - start) / (count - 1),
            "second reward": (both - one) / count,
        }
        results.append(seconds)
        print(name, turn, json.dumps({key: round(value, 4) for key, value in seconds.items()}), flush=True)

    def rate(key: str) -> str:
        return f"{2 / median(each[key] for each in results):.1f}"

    def ratio(above: str, below: str) -> str:
        values = sorted(each[above] / each[below] for each in results)
        return f"{median(values):.2f} ({values[0]:.2f} .. {values[-1]:.2f})"

    single, pair, bare = "published, one image at a time", "published, a pair at a time", "bare loop"
    return [
        f"| {name} | {rate(single)} | {rate(pair)} | {rate(bare)} | {rate('job')} | "
        f"{median(each['start'] for each in results):.1f} s |",
        f"| {name} | {ratio(single, 'job')} | {ratio(pair, 'job')} | {ratio(bare, 'job')} | "
        f"{ratio('second reward', bare)} |",
    ]


def main() -> None:
    """Run everything, or one program where --measure names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, pairs, *rest = arguments.measure
        if kind == "published":
            seconds = published_loop(Path(pairs), rest[0], int(rest[1]), int(rest[2]))
        elif kind == "bare":
            seconds = bare_loop(Path(pairs), rest[0], int(rest[1]))
        else:
            seconds = run_job([Path(each) for each in pairs.split(",")], rest[1:], int(rest[0]), slow=kind == "slow")
        print(seconds)
        return


if __name__ == "__main__":
    main()
