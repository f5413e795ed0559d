"""The programs that `benchmarks/speed/score.py` measures, each in a separate process, and their inputs.

python -m benchmarks.speed.score_programs PROGRAM PAIRS ...     prints wall-clock and CPU seconds
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import combinations, islice
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from benchmarks.page import ROOT
from smpo_models.weights import DTYPES
from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.jobs.cells import cell_values
from smpo_pipeline.jobs.score import job
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.chunks import with_scores, without_images
from smpo_pipeline.jobs.score.options import ScoreJobOptions, ScoreOptions
from smpo_pipeline.rewards import load_reward

TOY = ROOT / "pipeline/smpo_pipeline/toy/assets/rewards/pickscore"
BATCH = 32
SLEEP = 0.02
"""Seconds per image of the slow reward."""


class Cost(NamedTuple):
    """Wall-clock seconds, and CPU seconds of this process and its children."""

    clock: float
    cpu: float

    def each(self, count: int) -> Cost:
        """Cost per item of ``count``."""
        return Cost(self.clock / count, self.cpu / count)

    def mean(self, other: Cost) -> Cost:
        """Mean of two costs."""
        return Cost((self.clock + other.clock) / 2, (self.cpu + other.cpu) / 2)

    def less(self, other: Cost) -> Cost:
        """Difference to another cost."""
        return Cost(self.clock - other.clock, self.cpu - other.cpu)


class Stopwatch:
    """Measures the cost inside the context; samples processes five times per second, since some end before it does."""

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
    """Read the first pairs of the input."""
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


Batch = tuple[list[Image.Image], list[str]]


def batches_of(pairs: Path, count: int) -> Iterator[Batch]:
    """Decoded images, each once, and their prompts."""
    shown = dict.fromkeys((row[name], row["caption"]) for row in rows_of(pairs, count) for name in ("jpg_0", "jpg_1"))
    left = iter(shown)
    while batch := list(islice(left, BATCH)):
        yield [decode_image(data) for data, _ in batch], [caption for _, caption in batch]


def bare_loop(pairs: Path, spec: str, count: int, dtype: str, *, ready: bool) -> Cost:
    """Cost of our scorer on batches, which are ``ready``, or read and decoded as part of it."""
    reward, batches = load_reward(spec, "cpu"), list(batches_of(pairs, count)) if ready else []
    with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
        reward.score(*next(batches_of(pairs, count)))
        with Stopwatch() as watch:
            for images, prompts in batches or batches_of(pairs, count):
                reward.score(images, prompts)
    return watch.cost


def products(pairs: Path, spec: str, count: int) -> Cost:
    """Cost of as many multiplications as our scorer makes, in large matrix products."""
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
    """Stands in for rewards: the first one costs nothing, the last one sleeps."""

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Score all images alike."""
        num_images = len(cell_values(chunk, "height"))
        if self._last:
            time.sleep(SLEEP * num_images)
        scored = with_scores(chunk, {self._reward.name: np.zeros(num_images)})
        return without_images(scored) if self._last else scored


def run_job(pairs: Sequence[Path], specs: Sequence[str], count: int, dtype: str, *, slow: bool = False) -> Cost:
    """Cost of the whole job, Ray's start included."""
    if slow:
        job.RewardActor = SlowActor
    with tempfile.TemporaryDirectory() as out:
        options = ScoreOptions(
            pairs=tuple(pairs),
            out=Path(out) / "scores",
            reward=tuple(specs),
            running=ScoreJobOptions(batch_size=BATCH, device="cpu", dtype=dtype, limit=count),
        )
        with Stopwatch() as watch:
            job.score(options)
        return watch.cost


def make_pairs(path: Path, count: int, side: int, images_per_prompt: int = 2) -> Path:
    """Write pairs of smooth random JPEGs in Pick-a-Pic columns, with captions of 10 to 14 tokens."""
    generator = np.random.default_rng(0)
    colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        words = [f"a {generator.choice(colours)} {generator.choice(shapes)}" for _ in range(2)]
        images = []
        for _ in range(images_per_prompt):
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
    """Write a random CLIP of ViT-B/32's shape (the default of transformers), 224 pixels, 77 tokens."""
    return make_clip(path, CLIPConfig(), seed)


def make_clip(path: Path, config: CLIPConfig, seed: int) -> Path:
    """Write the folder of a :func:`build_clip`."""
    for part in build_clip(config, seed):
        part.save_pretrained(path)
    return path


def build_clip(
    config: CLIPConfig, seed: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]:
    """Make a random CLIP of this shape, the embedded world's tokenizer, and image processor: what a reward needs."""
    tokenizer = CLIPTokenizer.from_pretrained(TOY, model_max_length=77)
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.bos_token_id = tokenizer.bos_token_id
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    with torch.device(device):
        clip = CLIPModel(config)
    side = config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return clip.to(dtype), tokenizer, processor


def run_program(kind: str, pairs: str, *rest: str) -> Cost:
    """Run one of the measured programs in this process."""
    if kind == "published":
        return published_loop(Path(pairs), rest[0], int(rest[1]), int(rest[2]))
    if kind in ("bare", "decoding"):
        return bare_loop(Path(pairs), rest[0], int(rest[1]), rest[2], ready=kind == "bare")
    if kind == "products":
        return products(Path(pairs), rest[0], int(rest[1]))
    return run_job([Path(each) for each in pairs.split(",")], rest[2:], int(rest[0]), rest[1], slow=kind == "slow")


if __name__ == "__main__":
    print(json.dumps(run_program(*sys.argv[1:])))
