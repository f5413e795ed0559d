"""``smpo-pipeline invert`` on Ray Data: read, decode and crop -> actors that invert and write one shard a unit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from smpo_pipeline.buckets import Size, list_buckets
from smpo_pipeline.inversion.checks import check_settings, sizes_of_images
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.jobs.cluster import Pool, require_gpus, run_units
from smpo_pipeline.jobs.guard import Guard
from smpo_pipeline.jobs.invert_unit import (
    STAGE,
    InvertActor,
    InvertOptions,
    describe_model,
    index_part,
    load_models,
)
from smpo_pipeline.jobs.ledger import Ledger, SharedLedger
from smpo_pipeline.jobs.lock import locked
from smpo_pipeline.jobs.prepare import prepare_unit, reading_words, to_bytes
from smpo_pipeline.jobs.run import Run, UnitRecord, describe_input
from smpo_pipeline.planning.size import pairs_that_fit
from smpo_schemas.errors import UserError
from smpo_schemas.manifest import (
    MANIFEST_FILE,
    MANIFEST_VERSION,
    REJECTS_FILE,
    Manifest,
    ModelInfo,
    ShardEntry,
    Totals,
    read_manifest,
    write_manifest,
)
from smpo_schemas.pairs import PairColumns, RowRange, columns_of, list_pair_files, slice_files
from smpo_schemas.rejects import count_reasons, write_rejects
from smpo_schemas.scores import SAME_SCORE, ScoresInfo, read_scores, read_scores_info
from smpo_schemas.shard_index import INDEX_FILE, write_index
from smpo_schemas.shards import ShardDirectory
from smpo_schemas.store import AnyPath


def invert(options: InvertOptions) -> Manifest:
    """Make shards of all scored pairs, or finish what an earlier run of the same command began.

    Raises:
        UserError: an input, the model or the output directory cannot be used, or no pair is left.
    """
    files = list_pair_files(options.pairs)
    columns = columns_of(files, options.columns)
    info = read_scores_info(options.scores)
    model, resolution, image_sizes, pairs_per_shard = _check_model(options)
    options = options.model_copy(update={"pairs_per_shard": pairs_per_shard})
    units = slice_files(files, pairs_per_shard, options.limit)
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
        "pairs_per_shard": pairs_per_shard,
    }
    run = Run(options.out, MANIFEST_FILE, identity)
    with locked(options.out):
        if not run.open(overwrite=options.overwrite, patterns=("shard-*.tar", INDEX_FILE, REJECTS_FILE)):
            return read_manifest(options.out)
        return _invert(options, run, units, columns, info, model, resolution, image_sizes)


def _invert(
    options: InvertOptions,
    run: Run,
    units: Sequence[list[RowRange]],
    columns: dict[AnyPath, PairColumns],
    info: ScoresInfo,
    model: ModelInfo,
    resolution: int,
    image_sizes: Sequence[Size],
) -> Manifest:
    """Make the shards that are missing, and finish."""
    scores = _score_table(options.scores, info)
    sizes = [sum(part.stop - part.start for part in unit) for unit in units]

    def build(source: ray.data.Dataset, ledger: SharedLedger) -> ray.data.Dataset:
        require_gpus(options.device, options.concurrency)
        pool = Pool(options.concurrency, num_gpus=1 if options.device == "cuda" else 0)
        prepare = partial(
            _prepare, units=units, columns=columns, options=options, image_sizes=image_sizes, run=run, ledger=ledger
        )
        kwargs = {
            "options": options,
            "model": model,
            "run": run,
            "scores": ray.put(scores),
            "rows": sum(sizes),
            "resolution": resolution,
            "ledger": ledger,
        }
        return source.map(prepare, num_cpus=1).map(InvertActor, fn_constructor_kwargs=kwargs, **pool.options())

    rate = options.max_reject_rate
    records = run_units(run, sizes, build, _records, title="invert", address=options.ray_address, max_reject_rate=rate)
    manifest = _finish(options, run, records, info, model, resolution)
    run.finish()
    return manifest


def _records(table: pa.Table) -> list[UnitRecord]:
    """Of the shards that actors have committed."""
    return [UnitRecord.model_validate_json(record) for record in table["record"].to_pylist()]


def _score_table(directory: AnyPath, info: ScoresInfo) -> pa.Table:
    """``pair_id``, ``prompt`` and the score columns.

    Raises:
        UserError: one id stands for pairs with different scores.
    """
    names = [f"{name}_{index}" for name in info.rewards for index in range(2)]
    table = read_scores(directory, info, ["pair_id", "prompt", *names]).combine_chunks()
    # A pair that several annotators labelled is there several times, with the same images and so the same scores, but
    # for the rounding of batches of other sizes.
    found = table.group_by("pair_id").aggregate([(name, kind) for name in names for kind in ("min", "max")])
    for name in names:
        reward = info.rewards[name[:-2]]
        apart = pc.greater(
            pc.subtract(found[f"{name}_max"], found[f"{name}_min"]), SAME_SCORE * (reward.max - reward.min)
        )
        clash = found.filter(apart)
        if clash.num_rows:
            raise UserError(
                f"{directory}: pair_id {clash['pair_id'][0].as_py()!r} stands for pairs with different scores; "
                "score with another --pair-id-column, or with none"
            )
    return table


def _check_model(options: InvertOptions) -> tuple[ModelInfo, int, tuple[Size, ...], int]:
    """Load the model once, before any work starts: fingerprints, resolution, the images' sizes, pairs per shard."""
    family, walker = load_models(options, "cpu")
    resolution = check_settings(family, options.model, options.resolution, options.settings)
    info = describe_model(options, family, walker)
    sizes = sizes_of_images(family, resolution, options.settings)
    if options.shard_bytes is None:
        return info, resolution, sizes, options.pairs_per_shard
    latent = family.latent_shape(resolution, resolution)
    return info, resolution, sizes, pairs_that_fit(options.shard_bytes, latent, options.settings, family.process)


def _prepare(
    row: dict[str, Any],
    units: Sequence[list[RowRange]],
    columns: dict[AnyPath, PairColumns],
    options: InvertOptions,
    image_sizes: Sequence[Size],
    run: Run,
    ledger: Ledger,
) -> dict[str, Any]:
    unit = row["unit"]
    # Asked for again, because what came of it was lost on its way to the driver: the actor knows what to say.
    ranges = [] if run.committed(unit) else units[unit]
    names = [columns[part.path] for part in ranges]
    with Guard(ledger).working(("read", unit), reading_words(ranges)):
        table, rejects = prepare_unit(ranges, names, unit * options.pairs_per_shard, image_sizes, STAGE)
    return {
        "unit": unit,
        "table": to_bytes(table),
        "rejects": json.dumps([reject.model_dump() for reject in rejects]),
    }


def _finish(
    options: InvertOptions,
    run: Run,
    records: Sequence[UnitRecord],
    info: ScoresInfo,
    model: ModelInfo,
    resolution: int,
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
    buckets: Counter[Size] = Counter()
    for bucket in (bucket for record in records for bucket in record.buckets):
        buckets[bucket.height, bucket.width] += bucket.pairs
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
            prompts_cut=sum(record.prompts_cut for record in records),
        ),
        rejected_reasons=count_reasons(rejects),
        health=health.bands(model.num_train_timesteps),
        buckets=list_buckets(buckets),
        versions={name: version(name) for name in ("smpo-diffusion", "torch", "diffusers", "transformers", "numpy")},
    )
    parts = [index_part(run, record.unit) for record in records if record.entry]
    manifest = manifest.model_copy(update={"index": write_index(ShardDirectory(options.out, manifest), parts)})
    write_manifest(options.out, manifest)
    return manifest
