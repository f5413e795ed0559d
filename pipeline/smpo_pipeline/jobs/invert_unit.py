"""What a model actor of ``smpo-pipeline invert`` does: a unit of prepared pairs becomes one committed shard."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import BaseModel, ConfigDict
from torch import nn

from smpo_models.family import Family
from smpo_models.loading import DTYPES, load_family, load_walker
from smpo_pipeline.buckets import Size, list_buckets
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.batch_size import (
    batches_of_one_size,
    choose_batch_size,
    walk_requests,
    with_most_pixels,
)
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.jobs.cluster import use_threads
from smpo_pipeline.jobs.paths import AbsolutePath, HubIdOrFolder
from smpo_pipeline.jobs.prepare import from_bytes, pixels_of
from smpo_pipeline.jobs.run import Run, UnitRecord, write_record
from smpo_schemas.files import read_json, write_json
from smpo_schemas.manifest import InversionSettings
from smpo_schemas.rejects import Reject
from smpo_schemas.shards import Sample, ShardWriter

STAGE = "invert"
_MEASURED_PAIRS = 128
"""About how many pairs walk health is measured on; one more forward for each of their states."""

_BATCH_SIZES = ".batch-size-*.json"


class InvertOptions(BaseModel):
    """Everything ``invert`` is told; fields as the command line's flags."""

    model_config = ConfigDict(frozen=True)

    pairs: list[AbsolutePath]
    scores: AbsolutePath
    model: HubIdOrFolder
    out: AbsolutePath
    unet: AbsolutePath | None
    walker: AbsolutePath | None
    vae: HubIdOrFolder | None
    resolution: int | None
    settings: InversionSettings
    columns: dict[str, str | None]
    seed: int
    pairs_per_shard: int
    batch_size: int | None
    device: str
    concurrency: int
    ray_address: str | None
    limit: int | None
    overwrite: bool


def load_models(options: InvertOptions, device: str) -> tuple[Family, nn.Module]:
    """The model with its reference denoiser, and the walker (the reference itself unless --walker is given)."""
    family = load_family(options.model, denoiser=options.unet, vae=options.vae, device=device)
    if options.walker is None:
        return family, family.denoiser
    return family, load_walker(family, options.model, options.walker, device)


class InvertActor:
    """Holds the model; turns a unit into a shard and commits it."""

    def __init__(self, options: InvertOptions, run: Run, scores: ray.ObjectRef, rows: int, resolution: int) -> None:
        use_threads(options.device, options.concurrency)
        family, walker = load_models(options, options.device)
        dtype = DTYPES[options.settings.dtype]
        for module in {family.denoiser, walker}:
            module.to(dtype)
        self._inverter = Inverter(family, walker, options.settings, options.seed)
        self._family, self._options, self._run = family, options, run
        self._scores: pa.Table = ray.get(scores)
        self._measure_every = max(1, rows // _MEASURED_PAIRS)
        self._batch_size, self._resolution = options.batch_size, resolution

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Invert and commit one unit; returns its record as JSON."""
        rejects = [Reject(**each) for each in json.loads(row["rejects"])]
        health = HealthSums()
        unit = int(row["unit"])
        pairs = list(self._pairs(from_bytes(row["table"]), rejects))
        kept = prompts_cut = 0
        sizes: Counter[Size] = Counter()
        with ShardWriter(self._run.out / f"shard-{unit:06d}.tar") as shard:
            for (number, source, pair), samples in zip(pairs, self._walks(pairs, health), strict=True):
                if isinstance(samples, str):
                    rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=STAGE, reason=samples))
                    continue
                kept += 1
                sizes[pair.image_size] += 1
                prompts_cut += self._family.cuts(pair.prompt)
                for sample in samples:
                    shard.write(f"{number * self._options.settings.walks + sample.meta.walk:010d}", sample)
        record = UnitRecord(
            unit=unit,
            pairs_in=kept + len(rejects),
            pairs=kept,
            rejects=rejects,
            entry=shard.entry.model_dump() if kept else None,
            health=health.to_lists(),
            prompts_cut=prompts_cut,
            buckets=list_buckets(sizes) if self._options.settings.buckets else [],
        )
        if not kept:
            (self._run.out / shard.entry.name).unlink()
        write_record(self._run.record_path(unit), record)
        return {"record": record.model_dump_json()}

    def _pairs(self, table: pa.Table, rejects: list[Reject]) -> Iterator[tuple[int, str, PreparedPair]]:
        """Input row number, source and pair of every pair of a unit that has scores."""
        found = pc.index_in(table["pair_id"], value_set=self._scores["pair_id"]).to_pylist()
        for row, position in zip(table.to_pylist(), found, strict=True):
            if position is None:
                reason = f"no score: this pair is not in {self._options.scores} (rejected there, or not scored)"
                rejects.append(Reject(pair_id=row["pair_id"], source=row["source"], stage=STAGE, reason=reason))
                continue
            scores = self._scores.slice(position, 1).to_pylist()[0]
            if scores["prompt"] != row["prompt"]:
                reason = f"other pair: {self._options.scores} has another prompt for this pair_id"
                rejects.append(Reject(pair_id=row["pair_id"], source=row["source"], stage=STAGE, reason=reason))
                continue
            names = [name[:-2] for name in scores if name.endswith("_0")]
            pair = PreparedPair(
                pair_id=row["pair_id"],
                prompt=row["prompt"],
                label=row["label"],
                annotator=row["annotator"],
                scores={name: (scores[f"{name}_0"], scores[f"{name}_1"]) for name in names},
                pixels_2HW3=np.stack([pixels_of(row, 0), pixels_of(row, 1)]),
                size=_two_pairs(row["size"]),
                crop=_two_pairs(row["crop"]),
                measured=row["row"] % self._measure_every == 0,
            )
            yield row["row"], row["source"], pair

    def _walks(
        self, pairs: Sequence[tuple[int, str, PreparedPair]], health: HealthSums
    ) -> Iterator[list[Sample] | str]:
        """All walks of each pair, made ``batch_size`` walks at a time, or the reason why there are none."""
        walks = self._options.settings.walks
        requests = [(pair, walk) for _, _, pair in pairs for walk in range(walks)]
        made: dict[int, Sample | str] = {}
        if requests and self._batch_size is None:
            self._batch_size = self._find_batch_size([pair for _, _, pair in pairs])
        for positions in batches_of_one_size(requests, self._batch_size or 1):
            samples, sums = self._inverter.invert([requests[position] for position in positions])
            made |= zip(positions, samples, strict=True)
            health += sums
        for start in range(0, len(requests), walks):
            of_pair = [made[position] for position in range(start, start + walks)]
            problems = [each for each in of_pair if isinstance(each, str)]
            yield problems[0] if problems else [each for each in of_pair if isinstance(each, Sample)]

    def _find_batch_size(self, pairs: Sequence[PreparedPair]) -> int:
        """``--batch-size auto``, for the device that this actor is on; leaves a file that says what was found."""
        trials = walk_requests(with_most_pixels(pairs, self._resolution))
        size = choose_batch_size(
            lambda count: self._inverter.invert([next(trials) for _ in range(count)]),
            self._options.pairs_per_shard * self._options.settings.walks,
            self._options.device,
        )
        write_json(self._run.out / _BATCH_SIZES.replace("*", f"{socket.gethostname()}-{os.getpid()}"), size)
        return size


def take_batch_sizes(out: Path) -> list[int]:
    """What the actors of a run that has ended found with ``--batch-size auto``; the files that said so are removed."""
    files = sorted(out.glob(_BATCH_SIZES))
    found = sorted({read_json(file) for file in files})
    for file in files:
        file.unlink()
    return found


def _two_pairs(values: list[list[int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    first, second = values
    return (first[0], first[1]), (second[0], second[1])
