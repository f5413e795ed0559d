"""From a measured rate and exact sizes to hours, bytes and dollars."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from smpo_common.errors import UserError
from smpo_models.loading import load_family, load_inverting_denoiser
from smpo_models.memory import is_out_of_memory
from smpo_pipeline.images.buckets import list_buckets
from smpo_pipeline.inversion.batch import draw_trajectory
from smpo_pipeline.inversion.batch_size import (
    choose_batch_size,
    trajectory_requests,
    with_most_pixels,
)
from smpo_pipeline.inversion.checks import check_settings, sizes_of_images
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.isolation import FAILURES
from smpo_pipeline.jobs.record.paths import AbsolutePathOrUrl
from smpo_pipeline.planning.rate import batches_of_units, measure_rate
from smpo_pipeline.planning.sample import sample_pairs
from smpo_pipeline.planning.size import forwards, num_shards, pairs_that_fit, total_bytes, trajectory_bytes
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import Bucket
from smpo_schemas.pairs import list_pair_files
from smpo_schemas.scores import read_scores_info

_SAMPLED = 256
"""Pairs whose texts are measured and whose images are inverted, at the most."""

_PROJECTED = (1_000_000, 100_000_000)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class PlanOptions(_Frozen):
    """Everything ``plan`` is told; fields as the command line's flags."""

    pairs: list[AbsolutePathOrUrl]
    scores: AbsolutePathOrUrl | None
    model: str
    unet: Path | None
    inverting_unet: Path | None
    vae: str | None
    variant: str | None
    resolution: int | None
    settings: InversionSettings
    columns: dict[str, str | None]
    seed: int
    pairs_per_shard: int
    shard_bytes: int | None
    batch_size: int | None
    device: str
    limit: int | None
    gpus: int
    price: float | None
    seconds: float


class Projection(_Frozen):
    """What one number of input pairs comes to.

    Attributes:
        pairs: input pairs.
        states: stored states (of both images each).
        device_hours: of one device.
        wall_hours: of ``gpus`` devices that are never idle.
        bytes, shards: of the tars.
        dollars: device hours times the price; None where no price was given.
    """

    pairs: int
    states: int
    device_hours: float
    wall_hours: float
    bytes: int
    shards: int
    dollars: float | None


class Plan(_Frozen):
    """What was measured, and what follows.

    Attributes:
        device: its name.
        model, resolution, settings, gpus, price: as asked for.
        batch_size: trajectories a batch.
        pairs_a_second: measured on one device.
        measured_trajectories, measured_seconds, warm: see :class:`smpo_pipeline.planning.rate.Rate`.
        buckets: image sizes of the sampled pairs (with `--buckets`).
        usable: share of the sampled pairs that can be inverted; the rest is rejected.
        sampled: pairs looked at.
        rewards: names of the scores that each sample carries.
        states_a_trajectory: mean.
        forwards_a_trajectory: of a denoiser, both images; by formula, or measured where the solver decides.
        forwards_measured: which of the two.
        bytes_a_trajectory: mean.
        peak_memory: see :class:`smpo_pipeline.planning.rate.Rate`.
        decoding_cores: CPU cores that decoding for one device keeps busy.
        projections: for this data set, and for larger ones of its kind.
    """

    device: str
    model: str
    resolution: int
    settings: InversionSettings
    gpus: int
    price: float | None
    batch_size: int
    pairs_a_second: float
    measured_trajectories: int
    measured_seconds: float
    warm: bool
    buckets: list[Bucket]
    usable: float
    sampled: int
    rewards: list[str]
    states_a_trajectory: float
    forwards_a_trajectory: float
    forwards_measured: bool
    bytes_a_trajectory: float
    peak_memory: int | None
    decoding_cores: float
    projections: list[Projection]


def make_plan(options: PlanOptions) -> Plan:
    """Measure the model on the device, and project.

    Raises:
        UserError: an input, the model or the device cannot be used.
    """
    files = list_pair_files(options.pairs)
    rewards = list(read_scores_info(options.scores).rewards) if options.scores else ["pickscore"]
    family = load_family(options.model, denoiser=options.unet, vae=options.vae, variant=options.variant)
    family.encodes_empty_prompt = options.settings.empty_prompt == "encoded"
    resolution = check_settings(family, options.model, options.resolution, options.settings)
    inverting_denoiser = family.denoiser
    if options.inverting_unet is not None:
        inverting_denoiser = load_inverting_denoiser(family, options.model, options.inverting_unet, options.variant)
    if family.denoiser is None or inverting_denoiser is None:
        raise RuntimeError("the model was loaded without its denoiser")
    sizes = sizes_of_images(family, resolution, options.settings)
    sampled = sample_pairs(files, options.columns, sizes, count=_SAMPLED, limit=options.limit, rewards=rewards)
    settings, pairs = options.settings, sampled.pairs
    if options.shard_bytes:
        latent = family.latent_shape(resolution, resolution)
        fitting = pairs_that_fit(options.shard_bytes, latent, settings, family.process)
        options = options.model_copy(update={"pairs_per_shard": fitting})
    inverter = Inverter(family, inverting_denoiser, settings, options.seed, options.device)
    batch_size = options.batch_size
    if batch_size is None:
        trials = trajectory_requests(with_most_pixels(pairs, resolution), first_trajectory=settings.trajectories)
        batch_size = choose_batch_size(
            lambda size: inverter.invert([next(trials) for _ in range(size)]),
            options.pairs_per_shard * settings.trajectories,
            options.device,
        )
    batches = batches_of_units(pairs, settings.trajectories, options.pairs_per_shard, batch_size)
    try:
        rate = measure_rate(inverter, inverter.denoisers, batches, options.seconds, options.device)
    except FAILURES as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--batch-size {batch_size}: too little memory ({error}); try --batch-size auto") from error
    trajectories = [
        draw_trajectory(pair, number, family, settings, options.seed)
        for pair in pairs
        for number in range(settings.trajectories)
    ]
    formula = [
        forwards(trajectory.plan, settings, own_inverting_denoiser=inverting_denoiser is family.denoiser)
        for trajectory in trajectories
    ]
    by_formula = [each for each in formula if each is not None]
    usable = len(pairs) / sampled.rows
    states = _mean([len(trajectory.plan.stored) for trajectory in trajectories])
    size = _mean(
        [
            trajectory_bytes(trajectory, family.latent_shape(*trajectory.pair.image_size), settings.storage)
            for trajectory in trajectories
        ]
    )
    pairs_a_second = rate.trajectories / rate.seconds / settings.trajectories

    def project(count: int) -> Projection:
        hours = count * usable / pairs_a_second / 3600
        return Projection(
            pairs=count,
            states=round(count * usable * settings.trajectories * states),
            device_hours=hours,
            wall_hours=hours / options.gpus,
            bytes=total_bytes(count, options.pairs_per_shard, usable * settings.trajectories * size),
            shards=num_shards(count, options.pairs_per_shard),
            dollars=None if options.price is None else hours * options.price,
        )

    on_gpu = options.device == "cuda"
    cpu = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    return Plan(
        device=torch.cuda.get_device_name() if on_gpu else cpu,
        model=options.model,
        resolution=resolution,
        settings=settings,
        gpus=options.gpus,
        price=options.price,
        batch_size=batch_size,
        pairs_a_second=pairs_a_second,
        measured_trajectories=rate.trajectories,
        measured_seconds=rate.seconds,
        warm=rate.warm,
        buckets=list_buckets(Counter(pair.image_size for pair in pairs)) if settings.buckets else [],
        usable=usable,
        sampled=sampled.rows,
        rewards=rewards,
        states_a_trajectory=states,
        forwards_a_trajectory=2 * _mean([each for each in formula if each is not None])
        if by_formula
        else rate.forwards / rate.trajectories,
        forwards_measured=not by_formula,
        bytes_a_trajectory=size,
        peak_memory=rate.peak_memory,
        decoding_cores=sampled.decode_seconds * pairs_a_second,
        projections=[project(count) for count in (sampled.total, *_PROJECTED)],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
