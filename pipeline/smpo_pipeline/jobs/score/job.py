"""``smpo-pipeline score`` on Ray Data: read and decode -> one actor pool per reward -> the driver commits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from rich.console import Console

from smpo_common.errors import UserError
from smpo_common.files import sha256_file
from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.cluster.pools import Pool, cluster_gpus, cores_by_machine, limit_memory, share_gpus
from smpo_pipeline.jobs.cluster.run_units import run_units
from smpo_pipeline.jobs.cluster.session import resolve_device
from smpo_pipeline.jobs.reading import Layouts, unit_sizes
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.jobs.record.run_record import SCORE_ROWS, SCORING_FOLDER, Run, describe_input, read_identity
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.chunks import CHUNK_BYTES, prepare_chunks
from smpo_pipeline.jobs.score.collector import UnitCollector, require_current_units
from smpo_pipeline.jobs.score.options import ScoreOptions
from smpo_pipeline.jobs.score.table import RewardRecord, write_table
from smpo_pipeline.options import absolute_spec
from smpo_pipeline.rewards import Reward, load_reward, parse_reward
from smpo_schemas.label_file import read_labels
from smpo_schemas.pairs import FURTHER, RowRange, layouts_of, list_pair_files, slice_files
from smpo_schemas.rejects import REJECTS_FILE
from smpo_schemas.scoring.scores import (
    PART_FILES,
    SCORES_FILE,
    SCORES_VERSION,
    ScoresInfo,
    read_scores_info,
    remove_leftovers,
)


def score(options: ScoreOptions) -> ScoresInfo:
    """Score all pairs with all rewards, or with those that a finished table lacks, or continue an unfinished run.

    Raises:
        UserError: an input, a reward or the output directory cannot be used, or no pair could be scored.
    """
    running, reading = options.running, options.columns.choices()
    options = options.replace(device=resolve_device(running.device, running.ray_address))
    options.out.exists()  # fails early if the bucket does not exist
    files = list_pair_files(options.pairs, reading)
    layouts = layouts_of(files)
    units = slice_files(files, SCORE_ROWS, running.limit)
    specs = _specs(options.reward)
    sizes = _pool_sizes(running.concurrency, specs)
    models = {name: _describe(load_reward(spec, "cpu"), running.dtype) for name, spec in specs.items()}
    labels = read_labels(options.labels) if options.labels else None
    identity = {
        "job": "score",
        "schema_version": SCORES_VERSION,
        **describe_input(files, reading, running.limit),
    }
    if options.labels:
        identity["labels"] = sha256_file(options.labels)
    run = Run(options.out, SCORES_FILE, identity)
    with locked(options.out):
        unfinished = run.open(overwrite=running.overwrite, patterns=(PART_FILES, REJECTS_FILE))
        base = None if unfinished else read_scores_info(options.out)
        if base:
            _refuse_other_weights(options.out, base, models)
        new = {name: model for name, model in models.items() if not base or name not in base.rewards}
        scoring = _open_scoring(options, identity, new, base)
        if base and not new:
            return base
        specs = {name: specs[name] for name in new}
        rows = unit_sizes(units)
        Console(markup=False).print(choices(options, specs, sum(rows)), highlight=False, soft_wrap=True)
        run_units(
            scoring,
            rows,
            partial(
                _add_stages,
                options=options,
                units=units,
                layouts=layouts,
                specs=specs,
                models=new,
                sizes=sizes,
            ),
            UnitCollector(scoring, list(new), running.max_reject_rate),
            title="score",
            address=running.ray_address,
            max_reject_rate=running.max_reject_rate,
        )
        further = [name for name in FURTHER if any(name in layout.further for layout in layouts.values())]
        info = write_table(options.out, scoring, len(units), new, base, further, labels)
        scoring.remove()
        return info


def choices(options: ScoreOptions, specs: Mapping[str, str], pairs: int) -> str:
    """Describe the job for the user: number of pairs, and the settings that were chosen by default."""
    batches = ", ".join(f"{name} {_batch_size(options, spec)}" for name, spec in specs.items())
    computing = f"{options.running.device}, {options.running.dtype}"
    return f"{pairs} pairs, images in their own size; {computing}; batch size: {batches}"


def _batch_size(options: ScoreOptions, spec: str) -> int:
    return options.running.batch_size or parse_reward(spec)[0].needs.batch_size


def _add_stages(
    source: ray.data.Dataset,
    work_log: WorkLog,
    options: ScoreOptions,
    units: Sequence[list[RowRange]],
    layouts: Layouts,
    specs: Mapping[str, str],
    models: Mapping[str, RewardRecord],
    sizes: Mapping[str, int],
) -> ray.data.Dataset:
    """Add decoding, then one actor pool per reward."""
    prepare = partial(prepare_chunks, units=units, layouts=layouts, work_log=work_log)
    dataset = source.map_batches(prepare, batch_size=1, batch_format="pyarrow", num_cpus=1)
    pools = _pools(options, specs, sizes)
    # A chain, not branches: Ray Data cannot feed one stream to several stages. Each reward costs a copy of the pixels.
    for place, (name, pool) in enumerate(pools.items(), start=1):
        dataset = dataset.map_batches(
            RewardActor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={
                "spec": specs[name],
                "fingerprint": models[name].fingerprint,
                "device": options.running.device if pool.num_gpus else "cpu",
                "dtype": options.running.dtype,
                "batch_size": _batch_size(options, specs[name]),
                "work_log": work_log,
                "share": 1 / len(pools),
                "last": place == len(pools),
            },
            **pool.options(),
        )
    # For each worker the current chunk and the next one, and some on their way.
    workers = sum(pool.size * pool.threads for pool in pools.values())
    limit_memory(dataset, CHUNK_BYTES * (2 * workers + 8))
    return dataset


def _specs(given: Sequence[str]) -> dict[str, str]:
    """Return the values of ``--reward`` by name."""
    specs: dict[str, str] = {}
    for spec in given:
        reward, _ = parse_reward(spec)
        if reward.name in specs:
            raise UserError(f"--reward names {reward.name} twice; a scores table has one set of columns per name")
        specs[reward.name] = absolute_spec(spec)
    return specs


def _describe(reward: Reward, dtype: str) -> RewardRecord:
    return RewardRecord(reward.model, reward.fingerprint, reward.unit, dtype)


def _refuse_other_weights(out: AnyPath, base: ScoresInfo, models: Mapping[str, RewardRecord]) -> None:
    for name, model in models.items():
        scored = base.rewards.get(name)
        if scored and scored.fingerprint != model.fingerprint:
            raise UserError(
                f"{out} holds scores of {name} with other weights ({scored.model}, fingerprint "
                f"{scored.fingerprint[:12]}; --reward: {model.model}, {model.fingerprint[:12]}); use another --out, or "
                "--overwrite to start over"
            )
        if scored and scored.dtype != model.dtype:
            raise UserError(
                f"{out} holds scores of {name} in {scored.dtype}, but --dtype is {model.dtype}; use another --out, or "
                "--overwrite to start over"
            )


def _open_scoring(
    options: ScoreOptions, identity: dict[str, Any], rewards: Mapping[str, RewardRecord], base: ScoresInfo | None
) -> Run:
    """Start or continue the run that scores with these rewards, after removing what a kill may have left.

    Raises:
        UserError: a run with other rewards, or of an earlier version, is unfinished.
    """
    wanted = {name: [model.fingerprint, model.dtype] for name, model in rewards.items()}
    onto = [part.sha256 for part in base.parts] if base else []
    scoring = Run(options.out / SCORING_FOLDER, SCORES_FILE, identity | {"rewards": wanted, "onto": onto})
    unfinished = (read_identity(scoring.out) or {}).get("rewards", {})
    if base:
        remove_leftovers(options.out, base)
        if unfinished.keys() <= base.rewards.keys():
            # Killed after the table with these rewards was written.
            scoring.remove()
            unfinished = {}
    if not rewards:
        return scoring
    if unfinished and unfinished != wanted and not options.running.overwrite:
        fix = f"or remove {scoring.out}" if base else "use another --out, or --overwrite to start over"
        raise UserError(
            f"{options.out} holds an unfinished run with other rewards ({', '.join(unfinished)}; with other weights or "
            f"another --dtype, if the names are the same); finish it with its own command, {fix}"
        )
    scoring.open(overwrite=options.running.overwrite, patterns=())
    require_current_units(scoring)
    return scoring


def _pool_sizes(given: Sequence[str], specs: Mapping[str, str]) -> dict[str, int]:
    """Parse ``--concurrency N`` and ``NAME=N``: actors by reward, without the rewards that have no number."""
    sizes: dict[str, int] = {}
    named: dict[str, int] = {}
    for text in given:
        name, separator, number = text.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or (separator and name not in specs):
            names = ", ".join(specs)
            raise UserError(f"--concurrency {text}: expected a number from 1, or NAME=N with a --reward ({names})")
        if separator:
            named[name] = int(number)
        else:
            sizes = dict.fromkeys(specs, int(number))
    return {**sizes, **named}


def _pools(options: ScoreOptions, specs: Mapping[str, str], given: Mapping[str, int]) -> dict[str, Pool]:
    """Make the actor pool of each reward. Default size: one actor per GPU; on CPU as many threads as cores."""
    everywhere = {name: parse_reward(spec)[0].needs for name, spec in specs.items()}
    # Rewards on servers come first in the chain: they take longest to answer.
    pools = {name: Pool(1, 0, need.threads) for name, need in everywhere.items() if need.remote}
    needs = {name: need for name, need in everywhere.items() if not need.remote}
    if needs and options.running.device == "cuda":
        num_gpus = cluster_gpus()
        sizes = {name: given.get(name, max(1, num_gpus)) for name in needs}
        shares = share_gpus({name: (sizes[name], need.num_gpus) for name, need in needs.items()}, num_gpus)
        return pools | {name: Pool(sizes[name], share, needs[name].threads) for name, share in shares.items()}
    cores = cores_by_machine(options.running.ray_address)
    for name, need in needs.items():
        # Threads of one actor share its weights, and prepare images while the model runs on others. All rewards run at
        # once, each with as many threads as cores: a fixed division would leave cores idle behind the slowest.
        per_machine = math.ceil(given.get(name, 1) / len(cores))
        threads = max(1, min(cores) // per_machine) if need.threads > 1 else 1
        pools[name] = Pool(given.get(name, sum(cores) // threads), 0, threads)
    return pools
