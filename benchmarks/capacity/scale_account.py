"""Compute the size of what a run over a hundred million pairs holds; a part of benchmarks/capacity/scale.py."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from benchmarks.page import stamp
from smpo_models.loading import load_family
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.jobs.record.run_record import SCORE_ROWS, UnitRecord
from smpo_pipeline.planning.size import pairs_that_fit
from smpo_pipeline.toy.create import ASSETS
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import ShardEntry
from smpo_schemas.pairs import PairFile, slice_files
from smpo_schemas.rejects import Reject
from smpo_schemas.scoring.scores import IMAGE_IDS, score_schema

MANY, FILES, GIGABYTE = 100_000_000, 10_000, 10**9


def account_page() -> Iterator[str]:
    """Make the section: sizes from formulas and from one real object of each kind."""
    schedule = load_family(str(ASSETS / "model")).noise_schedule
    shapes = {"SD 1.5, 512 pixels": (4, 64, 64), "SDXL, 1024 pixels": (4, 128, 128)}
    fitting = {name: pairs_that_fit(GIGABYTE, latent, InversionSettings(), schedule) for name, latent in shapes.items()}
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
    yield stamp("python -m benchmarks.capacity.scale", ("torch", "pyarrow"))
    yield ""
    yield f"{MANY:,} pairs in {FILES:,} Parquet files, with one trajectory per pair, two rewards, ids of 36 and prompts"
    yield "of 80 characters, and default settings except `--shard-size 1GB`. Computed from formulas and from the size"
    yield "of one real object of each kind; nothing of this size was run."
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
    """Mean size of an object on Python's heap, over a thousand of them."""
    tracemalloc.start()
    kept = [make() for _ in range(1000)]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(kept)
