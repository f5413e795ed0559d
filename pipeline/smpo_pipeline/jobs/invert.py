"""``smpo-pipeline invert`` on Ray Data: read, decode and crop -> actors that invert and write one shard a unit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import BaseModel, ConfigDict
from torch import nn

from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import DTYPES, load_family
from smpo_pipeline.images import resize_and_crop
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.jobs.cluster import actor_options, run_units, use_threads
from smpo_pipeline.jobs.prepare import from_bytes, pixels_of, prepare_unit, to_bytes
from smpo_pipeline.jobs.run import Run, UnitRecord, describe_input, write_record
from smpo_schemas.errors import UserError
from smpo_schemas.manifest import (
    MANIFEST_FILE,
    MANIFEST_VERSION,
    REJECTS_FILE,
    InversionSettings,
    Manifest,
    ModelInfo,
    ShardEntry,
    Totals,
    read_manifest,
    write_manifest,
)
from smpo_schemas.pairs import PairColumns, RowRange, column_names, list_pair_files, resolve_columns, slice_files
from smpo_schemas.rejects import Reject, count_reasons, write_rejects
from smpo_schemas.scores import ScoresInfo, read_scores, read_scores_info
from smpo_schemas.shards import Sample, ShardWriter

_STAGE = "invert"
_MEASURED_PAIRS = 128
"""About how many pairs walk health is measured on; one more forward for each of their states."""


class InvertOptions(BaseModel):
    """Everything ``invert`` is told; fields as the command line's flags."""

    model_config = ConfigDict(frozen=True)

    pairs: list[Path]
    scores: Path
    model: str
    out: Path
    unet: Path | None
    walker: Path | None
    vae: str | None
    resolution: int | None
    settings: InversionSettings
    columns: dict[str, str | None]
    seed: int
    pairs_per_shard: int
    batch_size: int
    device: str
    concurrency: int
    ray_address: str | None
    limit: int | None
    overwrite: bool


def invert(options: InvertOptions) -> Manifest:
    """Make shards of all scored pairs, or finish what an earlier run of the same command began.

    Raises:
        UserError: an input, the model or the output directory cannot be used, or no pair is left.
    """
    files = list_pair_files(options.pairs)
    columns = {file.path: resolve_columns(column_names(file.path), options.columns, file.path) for file in files}
    units = slice_files(files, options.pairs_per_shard, options.limit)
    info = read_scores_info(options.scores)
    scores = _score_table(options.scores, info)
    model, resolution = _check_model(options)
    identity = {
        "job": "invert",
        "schema_version": MANIFEST_VERSION,
        "input": describe_input(files, options.limit),
        "columns": {key: value for key, value in options.columns.items() if value},
        "scores": [part.sha256 for part in info.parts],
        "model": model.model_dump(),
        "resolution": resolution,
        "inversion": options.settings.model_dump(),
        "seed": options.seed,
        "pairs_per_shard": options.pairs_per_shard,
    }
    run = Run(options.out, MANIFEST_FILE, identity)
    if not run.open(overwrite=options.overwrite, patterns=("shard-*.tar", REJECTS_FILE)):
        return read_manifest(options.out)
    sizes = [sum(part.stop - part.start for part in unit) for unit in units]

    def build(source: ray.data.Dataset) -> ray.data.Dataset:
        prepare = partial(_prepare, units=units, columns=columns, options=options, resolution=resolution)
        kwargs = {"options": options, "run": run, "scores": ray.put(scores), "rows": sum(sizes)}
        return source.map(prepare, num_cpus=1).map(
            _InvertActor, fn_constructor_kwargs=kwargs, **actor_options(options.device, options.concurrency)
        )

    records = run_units(run, sizes, build, "invert", options.ray_address)
    manifest = _finish(options, records, info, model, resolution)
    run.finish()
    return manifest


def _score_table(directory: Path, info: ScoresInfo) -> pa.Table:
    """``pair_id`` and the score columns.

    Raises:
        UserError: one id stands for pairs with different scores.
    """
    names = [f"{name}_{index}" for name in info.rewards for index in range(2)]
    table = read_scores(directory, info, ["pair_id", *names]).combine_chunks()
    # A pair that several annotators labelled is there several times, with the same images and so the same scores.
    distinct = table.group_by(["pair_id", *names]).aggregate([]).group_by("pair_id").aggregate([([], "count_all")])
    clash = distinct.filter(pc.greater(distinct["count_all"], 1))
    if clash.num_rows:
        raise UserError(
            f"{directory}: pair_id {clash['pair_id'][0].as_py()!r} stands for pairs with different scores; "
            "score with another --pair-id-column, or with none"
        )
    return table


def _load(options: InvertOptions, device: str) -> tuple[Family, nn.Module]:
    """The model with its reference denoiser, and the walker (the reference itself unless --walker is given)."""
    family = load_family(options.model, denoiser=options.unet, vae=options.vae, device=device)
    if options.walker is None:
        return family, family.denoiser
    walker = load_family(options.model, ("denoiser",), denoiser=options.walker, device=device).denoiser
    return family, walker


def _check_model(options: InvertOptions) -> tuple[ModelInfo, int]:
    """Load the model once, before any work starts: its fingerprints, and the resolution to use."""
    family, walker = _load(options, "cpu")
    resolution = options.resolution or family.resolution()
    if resolution % family.resolution_multiple():
        raise UserError(
            f"--resolution {resolution}: {options.model} needs a multiple of {family.resolution_multiple()}"
        )
    start, last = options.settings.start, family.process.num_train_timesteps
    if isinstance(start, int) and not 0 <= start < last:
        raise UserError(f"--start {start}: {options.model} has timesteps 0 to {last - 1}")
    if options.settings.steps >= last:
        raise UserError(f"--steps {options.settings.steps}: {options.model} has only {last} timesteps")
    reference = fingerprint_module(family.denoiser)
    info = ModelInfo(
        id=options.model,
        kind=family.kind,
        prediction_type=family.process.prediction_type,
        reference=reference,
        walker=reference if walker is family.denoiser else fingerprint_module(walker),
        text=fingerprint_module(*family.text_modules),
        vae=fingerprint_module(family.vae),
        scheduler=family.process.fingerprint(),
        num_train_timesteps=last,
    )
    return info, resolution


def _prepare(
    row: dict[str, Any],
    units: Sequence[list[RowRange]],
    columns: dict[Path, PairColumns],
    options: InvertOptions,
    resolution: int,
) -> dict[str, Any]:
    unit = row["unit"]
    names = [columns[part.path] for part in units[unit]]
    crop = partial(resize_and_crop, resolution=resolution)
    table, rejects = prepare_unit(units[unit], names, unit * options.pairs_per_shard, crop, _STAGE)
    return {
        "unit": unit,
        "table": to_bytes(table),
        "rejects": json.dumps([reject.model_dump() for reject in rejects]),
    }


class _InvertActor:
    """Holds the model; turns a unit into a shard and commits it."""

    def __init__(self, options: InvertOptions, run: Run, scores: ray.ObjectRef, rows: int) -> None:
        use_threads(options.device, options.concurrency)
        family, walker = _load(options, options.device)
        dtype = DTYPES[options.settings.dtype]
        for module in {family.denoiser, walker}:
            module.to(dtype)
        self._inverter = Inverter(family, walker, options.settings, options.seed)
        self._options, self._run = options, run
        self._scores: pa.Table = ray.get(scores)
        self._measure_every = max(1, rows // _MEASURED_PAIRS)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        rejects = [Reject(**each) for each in json.loads(row["rejects"])]
        health = HealthSums()
        unit = int(row["unit"])
        pairs = list(self._pairs(from_bytes(row["table"]), rejects))
        kept = 0
        with ShardWriter(self._run.out / f"shard-{unit:06d}.tar") as shard:
            for number, source, pair, samples in self._walks(pairs, health):
                problem = next((sample for sample in samples if isinstance(sample, str)), None)
                if problem:
                    rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=_STAGE, reason=problem))
                    continue
                kept += 1
                for walk, sample in enumerate(samples):
                    shard.write(f"{number * self._options.settings.walks + walk:010d}", sample)
        record = UnitRecord(
            unit=unit,
            pairs_in=kept + len(rejects),
            pairs=kept,
            rejects=rejects,
            entry=shard.entry.model_dump() if kept else None,
            health=health.to_lists(),
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
                rejects.append(Reject(pair_id=row["pair_id"], source=row["source"], stage=_STAGE, reason=reason))
                continue
            scores = self._scores.slice(position, 1).to_pylist()[0]
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
    ) -> Iterator[tuple[int, str, PreparedPair, list[Sample | str]]]:
        """All walks of each pair, made ``batch_size`` walks at a time."""
        walks = self._options.settings.walks
        requests = [(pair, walk) for _, _, pair in pairs for walk in range(walks)]
        samples: list[Sample | str] = []
        for start in range(0, len(requests), self._options.batch_size):
            made, sums = self._inverter.invert(requests[start : start + self._options.batch_size])
            samples += made
            health += sums
        for index, (number, source, pair) in enumerate(pairs):
            yield number, source, pair, samples[index * walks : (index + 1) * walks]


def _two_pairs(values: list[list[int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    first, second = values
    return (first[0], first[1]), (second[0], second[1])


def _finish(
    options: InvertOptions, records: Sequence[UnitRecord], info: ScoresInfo, model: ModelInfo, resolution: int
) -> Manifest:
    """Write the rejects, then ``manifest.json``, which marks the run as finished."""
    rejects = [reject for record in records for reject in record.rejects]
    write_rejects(options.out / REJECTS_FILE, rejects)
    shards = [ShardEntry.model_validate(record.entry) for record in records if record.entry]
    if not shards:
        first = f"; the first: {rejects[0].source}: {rejects[0].reason}" if rejects else ""
        raise UserError(f"no pair is left, {len(rejects)} were rejected (see {options.out / REJECTS_FILE}){first}")
    health = HealthSums()
    for record in records:
        health += HealthSums(record.health)
    manifest = Manifest(
        schema_version=MANIFEST_VERSION,
        model=model,
        resolution=resolution,
        inversion=options.settings,
        seed=options.seed,
        rewards=info.rewards,
        shards=shards,
        totals=Totals(
            pairs_in=sum(record.pairs_in for record in records),
            pairs=sum(record.pairs for record in records),
            samples=sum(shard.samples for shard in shards),
            states=sum(shard.states for shard in shards),
            rejected=len(rejects),
            bytes=sum(shard.bytes for shard in shards),
        ),
        rejected_reasons=count_reasons(rejects),
        health=health.bands(model.num_train_timesteps),
        versions={name: version(name) for name in ("smpo-diffusion", "torch", "diffusers", "transformers", "numpy")},
    )
    write_manifest(options.out, manifest)
    return manifest
