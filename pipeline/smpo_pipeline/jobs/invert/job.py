"""``smpo-pipeline invert`` on Ray Data: read, decode and crop -> actors that invert and write one shard per unit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.console import Console

from smpo_common.errors import UserError
from smpo_common.retry import retry_transient
from smpo_common.store_path import AnyPath
from smpo_pipeline.images.buckets import Size, list_buckets
from smpo_pipeline.inversion.checks import check_settings, sizes_of_images
from smpo_pipeline.inversion.generated import KeptSource
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.jobs.cluster.pools import Pool, limit_memory, model_pool, task_memory
from smpo_pipeline.jobs.cluster.run_units import run_units
from smpo_pipeline.jobs.cluster.session import resolve_device
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.invert.candidates import (
    Found,
    check_configs,
    check_weights,
    find_candidates,
    kept_source,
    samplings,
)
from smpo_pipeline.jobs.invert.models import (
    ModelIdentity,
    choose_text,
    describe_model,
    load_models,
    read_configs,
    weight_bytes,
)
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.invert.prepare import prepare_row
from smpo_pipeline.jobs.invert.prompts import distinct_prompts
from smpo_pipeline.jobs.invert.text import store_text, text_run
from smpo_pipeline.jobs.reading import Layouts, unit_sizes
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord, describe_input, unit_records
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.shards import assemble_manifest, open_shards
from smpo_pipeline.planning.size import pairs_that_fit
from smpo_schemas.manifest import (
    MANIFEST_FILE,
    MANIFEST_VERSION,
    ImageSampling,
    Manifest,
    StoredTextEntry,
    autocast_arithmetic,
    write_manifest,
)
from smpo_schemas.pairs import RowRange, layouts_of, list_pair_files, slice_files
from smpo_schemas.scoring.scores import (
    IMAGE_IDS,
    ScoresInfo,
    read_scores,
    read_scores_info,
    score_columns,
    score_tolerance,
)


def invert(options: InvertOptions) -> Manifest:
    """Make shards of all pairs (given ``scores``, of those that have some), or continue an unfinished run.

    Raises:
        UserError: an input, the model or the output directory cannot be used, or every pair was rejected.
    """
    running = options.running
    options = options.replace(device=resolve_device(running.device, running.ray_address))
    options.out.exists()  # fails early if the bucket does not exist
    choices = options.columns.choices()
    files = list_pair_files(options.pairs, choices)
    info = read_scores_info(options.scores) if options.scores else None
    options, found = find_candidates(options, files)
    options = choose_text(options)
    checked = _check_model(options, found)
    options = options.replace(pairs_per_shard=checked.pairs_per_shard)
    units = slice_files(files, checked.pairs_per_shard, running.limit)
    identity = {
        "job": "invert",
        "schema_version": MANIFEST_VERSION,
        **describe_input(files, choices, running.limit),
        "scores": [part.content for part in info.parts] if info else [],
        "model": checked.model.model_dump(),
        "resolution": checked.resolution,
        "inversion": options.settings.model_dump(),
        "ref_error_arithmetic": autocast_arithmetic(options.settings.dtype),
        "has_ref_norm": True,  # of all of its shards: a run of an older version is not continued
        "seed": options.trajectory.seed,
        "pairs_per_shard": checked.pairs_per_shard,
        **({"samplings": [each.model_dump() for each in checked.samplings]} if found else {}),
    }
    run = Run(options.out, MANIFEST_FILE, identity)
    with locked(options.out):
        if finished := open_shards(run, text_run(options), overwrite=running.overwrite):
            return finished
        for line in options.choices(checked.resolution, sum(unit_sizes(units))):
            Console(markup=False).print(line, highlight=False, soft_wrap=True)
        for folder in found:
            Console(markup=False).print(f"latents of the images: {folder}", highlight=False, soft_wrap=True)
        return _invert(options, run, units, layouts_of(files), info, checked)


def _invert(
    options: InvertOptions,
    run: Run,
    units: Sequence[list[RowRange]],
    layouts: Layouts,
    info: ScoresInfo | None,
    checked: _Checked,
) -> Manifest:
    """Make the shards that are missing, then write the manifest."""
    running = options.running
    scores = _score_table(options.scores, info) if options.scores and info else None
    sizes = unit_sizes(units)
    text = None
    if options.storing.text == "stored":
        text = store_text(options, _needed_prompts(units, layouts, scores), checked.model, checked.text_weights)
    weights = checked.weights + (0 if text else checked.text_weights)

    def build(source: ray.data.Dataset, work_log: WorkLog) -> ray.data.Dataset:
        pool = model_pool(running.chosen_device, running.concurrency, running.ray_address, weights, len(units))
        prepare = partial(
            prepare_row,
            units=units,
            layouts=layouts,
            pairs_per_unit=options.storing.pairs_per_shard,
            sizes=checked.image_sizes,
            kept=checked.kept,
            run=run,
            work_log=work_log,
        )
        kwargs = {
            "options": options,
            "model": checked.model,
            "run": run,
            "scores": ray.put(scores),
            "rows": sum(sizes),
            "resolution": checked.resolution,
            "work_log": work_log,
            "text": text,
        }
        return _add_stages(source, prepare, kwargs, pool, max(sizes) * checked.pair_bytes)

    rate = running.max_reject_rate
    records = run_units(
        run, sizes, build, unit_records, title="invert", address=running.ray_address, max_reject_rate=rate
    )
    manifest = _finish(options, run, records, info, checked, text)
    if text:
        text_run(options).remove()
    run.finish()
    return manifest


def _add_stages(
    source: ray.data.Dataset,
    prepare: Callable[[pa.Table], pa.Table],
    kwargs: dict[str, object],
    pool: Pool,
    unit_bytes: int,
) -> ray.data.Dataset:
    """Add decoding and the actors; ``unit_bytes`` are the pixels, or the latents, of the largest unit."""
    one = {"batch_size": 1, "batch_format": "pyarrow"}
    decoded = source.map_batches(prepare, num_cpus=1, memory=task_memory(unit_bytes), **one)
    made = decoded.map_batches(InvertActor, fn_constructor_kwargs=kwargs, **one, **pool.options())
    # Units in Ray's object store: for each actor the current and the next one, and two more on their way. Each has 1 MB
    # for what is not pixels.
    limit_memory(made, (unit_bytes + (1 << 20)) * (2 * pool.size + 2))
    return made


def _score_table(directory: AnyPath, info: ScoresInfo) -> pa.Table:
    """Read the columns ``pair_id``, ``prompt``, image ids (if the table has them) and scores.

    Raises:
        UserError: pairs with different scores have one pair_id.
    """
    names = score_columns(info.rewards)
    table = read_scores(directory, info, ["pair_id", "prompt", *IMAGE_IDS, *names])
    # A pair with labels of several annotators has several rows, whose scores are the same up to rounding.
    ranges = table.group_by("pair_id").aggregate([(name, kind) for name in names for kind in ("min", "max")])
    for name in names:
        difference = pc.subtract(ranges[f"{name}_max"], ranges[f"{name}_min"])
        clash = ranges.filter(pc.greater(difference, score_tolerance(info.rewards[name[:-2]])))
        if clash.num_rows:
            raise UserError(
                f"{directory}: pairs with different scores have the same pair_id {clash['pair_id'][0].as_py()!r}; "
                "score again with another --pair-id-column, or without one"
            )
    # Arrow's take() fails on a string column of more than 2 GiB; group_by() fails on a single chunk of that size, so
    # the chunks are combined only now.
    return table.set_column(0, "pair_id", table["pair_id"].cast(pa.large_string())).combine_chunks()


@dataclass(frozen=True)
class _Checked:
    """Facts about the model, images and shards that are needed before any work starts."""

    model: ModelIdentity
    resolution: int
    image_sizes: tuple[Size, ...]
    pairs_per_shard: int
    weights: int
    """Bytes, without text encoders."""
    text_weights: int
    """Bytes of the text encoders."""
    kept: KeptSource | None
    samplings: list[ImageSampling]
    pair_bytes: int
    """Most bytes of a pair's pixels, or of its kept latents."""


def _check_model(options: InvertOptions, found: Found) -> _Checked:
    """Check the settings and the candidates against the model, and load it on the driver to identify it."""
    models = options.models
    configs = read_configs(options)
    resolution = check_settings(configs, models.model, models.resolution, options.settings)
    check_configs(found, configs, models.model)
    family, inverting_denoiser = load_models(options)
    model = describe_model(options, family, inverting_denoiser)
    check_weights(found, family, model)
    sizes = sizes_of_images(family, resolution, options.settings)
    pairs_per_shard, latent = options.storing.pairs_per_shard, family.latent_shape(resolution, resolution)
    if options.storing.shard_size is not None:
        pairs_per_shard = pairs_that_fit(options.storing.shard_size, latent, options.settings, family.noise_schedule)
    kept = kept_source(found, options)
    # Kept latents: those that the VAE decoded, and one per state.
    content = 4 * math.prod(latent) * (1 + kept.states * options.settings.steps) if kept else 3 * _most_pixels(sizes)
    return _Checked(
        model=model,
        resolution=resolution,
        image_sizes=sizes,
        pairs_per_shard=pairs_per_shard,
        weights=weight_bytes({family.denoiser, inverting_denoiser, family.vae}),
        text_weights=weight_bytes(family.text_modules),
        kept=kept,
        samplings=samplings(found),
        pair_bytes=2 * content,
    )


def _most_pixels(sizes: Iterable[Size]) -> int:
    return max(height * width for height, width in sizes)


def _needed_prompts(units: Sequence[list[RowRange]], layouts: Layouts, scores: pa.Table | None) -> list[str]:
    """Return the prompts of the input rows that may be inverted, and the empty one."""
    prompts = distinct_prompts([rows for unit in units for rows in unit], layouts)
    if scores is None:
        return prompts
    scored = set(scores["prompt"].to_pylist())
    return [prompt for prompt in prompts if not prompt or prompt in scored]


@retry_transient
def _finish(
    options: InvertOptions,
    run: Run,
    records: Sequence[UnitRecord],
    info: ScoresInfo | None,
    checked: _Checked,
    text: StoredTextEntry | None,
) -> Manifest:
    """Write the rejects, then ``manifest.json``, which marks the run as finished."""
    health = HealthSums()
    for record in records:
        health += HealthSums(record.health)
    buckets: Counter[Size] = Counter()
    for bucket in (bucket for record in records for bucket in record.buckets):
        buckets[bucket.height, bucket.width] += bucket.pairs
    manifest = assemble_manifest(
        run,
        records,
        model=checked.model.info(),
        resolution=checked.resolution,
        inversion=options.settings,
        seed=options.trajectory.seed,
        rewards=info.rewards if info else {},
        health=health.bands(checked.model.num_train_timesteps),
        text=text,
        buckets=list_buckets(buckets),
        samplings=checked.samplings,
    )
    write_manifest(options.out, manifest)
    return manifest
