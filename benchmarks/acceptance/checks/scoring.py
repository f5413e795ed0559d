"""Check scoring: the GPU's own rate, and the number of cores that keep it busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.acceptance.checks.ceilings import operations
from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import World
from benchmarks.speed.score_programs import make_pairs
from smpo_pipeline.images.decoder import Decoder
from smpo_pipeline.jobs.cells import cell_values
from smpo_pipeline.jobs.reading import read_unit
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.chunks import cut_chunks
from smpo_schemas.pairs import layouts_of, list_pair_files, slice_files

TURNS = 3
"""Repetitions of the pairs, so that many threads have chunks."""


def check_scoring(world: World, report: Report) -> None:
    """Measure ViT-H alone, the reward's actor by number of threads, and decoding in child processes."""
    size = world.size
    pairs = make_pairs(world.work / "scored.parquet", size.score_pairs, size.score_side)
    decoded = _chunks(pairs)
    chunks = [_numbered(chunk, turn) for turn in range(TURNS) for chunk in decoded]
    images = sum(len(cell_values(chunk, "height")) for chunk in chunks)
    actor = RewardActor(
        f"pickscore={world.model('clip')}",
        "",
        world.device.name,
        "bf16",
        size.score_batch,
        WorkLog(),
        share=1,
        last=True,
    )
    actor._fingerprint = actor._reward.fingerprint  # noqa: SLF001  (the driver's, which loads it once more)
    alone = _tower_rate(world, report, actor)
    actor(chunks[0])
    fed = {}
    for threads in size.threads:
        fed[threads] = images / _seconds(actor, chunks, threads)
        report.note(**{f"actor, {threads} threads: images/s": fed[threads]})
    report.note(share_of_the_device_that_is_busy=max(fed.values()) / alone)
    files = [row[name] for row in pq.read_table(pairs).to_pylist() for name in ("jpg_0", "jpg_1")]
    rates = {}
    for children in size.children:
        rates[children] = _decoding_rate(files, children)
        report.note(**{f"decoding, {children} children: images/s": rates[children]})
    each = rates[size.children[0]], fed[size.threads[0]] / size.threads[0]
    report.note(cores_a_device_needs=sum(alone / rate for rate in each))


def _tower_rate(world: World, report: Report, actor: RewardActor) -> float:
    """Images per second of the reward's image tower on ready tensors, in bfloat16."""
    clip, count = actor._reward._clip, world.size.score_batch  # noqa: SLF001
    side = clip.config.vision_config.image_size
    pixels = torch.randn(count, 3, side, side, device=world.device.name)
    half, rates = lambda: torch.autocast(world.device.name, torch.bfloat16), {}
    for name, context in (("fp32", nullcontext), ("bf16", half)):

        @torch.no_grad()
        def run(context: Callable[[], object] = context) -> None:
            with context():
                clip.get_image_features(pixel_values=pixels)

        rates[name] = count / world.device.seconds(run)
        report.note(**{f"tower {name}: images/s": rates[name]})
    ceiling = world.notes.get("rates", {}).get("mm half")
    least = ceiling and 0.8 * ceiling * count / operations(run)
    report.judge("tower bf16: images/s", rates["bf16"] if least else None, least=least or 0.0, on_cpu=False)
    return rates["bf16"]


def _chunks(pairs: object) -> list[pa.Table]:
    """Decode the pairs of a Parquet file into the actor's chunks."""
    files = list_pair_files([pairs])
    layouts = layouts_of(files)
    (ranges,) = slice_files(files, files[0].rows, None)
    return list(cut_chunks(0, read_unit(ranges, layouts)))


def _numbered(chunk: pa.Table, unit: int) -> pa.Table:
    """Give a chunk another unit number: two threads with the same chunk would look like a crashed worker."""
    return chunk.set_column(chunk.schema.get_field_index("unit"), "unit", pa.array([unit]))


def _seconds(actor: RewardActor, chunks: Sequence[pa.Table], threads: int) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(actor, chunks))
    return time.perf_counter() - began


def _decoding_rate(files: Sequence[bytes], children: int) -> float:
    """Files per second, without starting the child processes."""
    decoders = [Decoder() for _ in range(children)]
    with ThreadPoolExecutor(children) as pool:
        list(pool.map(lambda decoder: decoder.decode(files[0]), decoders))
        began = time.perf_counter()
        list(pool.map(lambda part: [decoders[part].decode(file) for file in files[part::children]], range(children)))
        return len(files) / (time.perf_counter() - began)
