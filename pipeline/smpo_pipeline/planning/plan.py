"""Project hours, bytes and dollars of an inversion from a measured rate and exact sizes."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from rich.console import Console

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_models.memory import is_out_of_memory
from smpo_pipeline.batch_size import choose_batch_size
from smpo_pipeline.images.buckets import list_buckets
from smpo_pipeline.inversion.batch import draw_trajectory
from smpo_pipeline.inversion.checks import check_settings, sizes_of_images
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.inversion.requests import trajectory_requests, with_most_pixels
from smpo_pipeline.isolation import FAILURES
from smpo_pipeline.jobs.invert.candidates import Found, check_configs, find_candidates, kept_source
from smpo_pipeline.jobs.invert.models import choose_text, load_models, read_configs
from smpo_pipeline.planning.options import PlanOptions
from smpo_pipeline.planning.rate import Rate, batches_of_units, measure_rate
from smpo_pipeline.planning.sample import SampledPairs, sample_pairs
from smpo_pipeline.planning.size import forwards, num_shards, pairs_that_fit, total_bytes, trajectory_bytes
from smpo_pipeline.planning.text import EncodedPrompts, TextPlan, encode_sampled
from smpo_schemas.frozen import FrozenModel
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import Bucket
from smpo_schemas.pairs import PairFile, list_pair_files
from smpo_schemas.scoring.scores import read_scores_info

_SAMPLED = 256
"""Most pairs to sample from the data set."""

_PROJECTED = (1_000_000, 100_000_000)
"""Numbers of pairs to project for, besides the data set's own."""


class Projection(FrozenModel):
    """The cost of inverting a number of input pairs.

    Attributes:
        pairs: input pairs.
        states: stored states, each of both images.
        device_hours: summed over devices.
        wall_hours: with ``gpus`` devices that are never idle.
        bytes, shards: size and number of the tars.
        text_bytes: size of the stored embeddings of the prompts; 0 with ``--text live``. Larger data sets are assumed
            to have as many distinct prompts per pair.
        dollars: device hours times the price; None without a price.
    """

    pairs: int
    states: int
    device_hours: float
    wall_hours: float
    bytes: int
    text_bytes: int
    shards: int
    dollars: float | None


class Plan(FrozenModel):
    """Measurements and projections.

    Attributes:
        device: its name.
        model, resolution, settings, gpus, price: from the flags.
        batch_size: trajectories per batch.
        pairs_per_second: rate of one device.
        measured_trajectories, measured_seconds, warm: see :class:`smpo_pipeline.planning.rate.Rate`.
        buckets: image sizes of the sampled pairs (with `--buckets`).
        usable: share of the sampled pairs that can be inverted, 0 to 1; the others are rejected.
        sampled: number of sampled pairs.
        rewards: names of the scores in each sample.
        states_a_trajectory: mean number of stored states.
        forwards_a_trajectory: mean number of forwards of a denoiser for both images, by formula, or measured if the
            solver iterates until convergence.
        forwards_measured: whether it was measured.
        bytes_a_trajectory: mean size in a tar.
        text: storing the data set's prompts; None with ``--text live``.
        peak_memory: see :class:`smpo_pipeline.planning.rate.Rate`.
        decoding_cores: CPU cores that decoding for one device keeps busy.
        projections: for this data set, and for larger ones like it.
    """

    device: str
    model: str
    resolution: int
    settings: InversionSettings
    gpus: int
    price: float | None
    batch_size: int
    measured_trajectories: int
    measured_seconds: float
    warm: bool
    buckets: list[Bucket]
    usable: float
    sampled: int
    rewards: list[str]
    pairs_per_second: float
    states_a_trajectory: float
    forwards_a_trajectory: float
    forwards_measured: bool
    bytes_a_trajectory: float
    text: TextPlan | None
    peak_memory: int | None
    decoding_cores: float
    projections: tuple[Projection, ...] = ()


@dataclass(frozen=True)
class _Subject:
    """The loaded model, on the device, and sampled pairs for it."""

    family: Family
    inverter: Inverter
    resolution: int
    sampled: SampledPairs
    pairs_per_shard: int
    rewards: list[str]
    text: EncodedPrompts | None


def make_plan(options: PlanOptions, console: Console) -> Plan:
    """Print the settings that were chosen by default, measure the model on the device, and project.

    Raises:
        UserError: an input, the model or the device cannot be used.
    """
    device = options.running.chosen_device
    files = list_pair_files(options.pairs, options.columns.choices())
    options, found = find_candidates(choose_text(options), files)
    subject = _prepare(options, files, found)
    for line in options.choices(subject.resolution, subject.sampled.total):
        console.print(line, highlight=False, soft_wrap=True)
    trajectories = options.trajectory.trajectories
    batch_size = options.running.batch_size or _choose_batch_size(subject, trajectories, device)
    batches = batches_of_units(subject.sampled.pairs, trajectories, subject.pairs_per_shard, batch_size)
    try:
        rate = measure_rate(
            subject.inverter.invert, subject.inverter.denoisers, batches, options.projection.seconds, device
        )
    except FAILURES as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--batch-size {batch_size}: too little memory ({error}); try --batch-size auto") from error
    return _plan(options, subject, rate, batch_size)


def _prepare(options: PlanOptions, files: Sequence[PairFile], found: Found) -> _Subject:
    """Load the model, and decode the sampled pairs, or read their latents."""
    scores, settings = options.projection.scores, options.settings
    rewards = list(read_scores_info(scores).rewards) if scores else ["pickscore"]
    configs = read_configs(options)
    resolution = check_settings(configs, options.models.model, options.models.resolution, settings)
    check_configs(found, configs, options.models.model)
    family, inverting_denoiser = load_models(options, text=settings.text == "live")
    sampled = sample_pairs(
        files,
        sizes_of_images(family, resolution, settings),
        count=_SAMPLED,
        limit=options.running.limit,
        rewards=rewards,
        kept=kept_source(found, options),
    )
    pairs_per_shard = options.storing.pairs_per_shard
    if options.storing.shard_size:
        latent = family.latent_shape(resolution, resolution)
        pairs_per_shard = pairs_that_fit(options.storing.shard_size, latent, settings, family.noise_schedule)
    device, seed = options.running.chosen_device, options.trajectory.seed
    text = None
    if settings.text == "stored":
        # Before the denoisers are on the device, as in `invert`.
        family.stored_text = text = encode_sampled(options, files, [pair.prompt for pair in sampled.pairs])
    inverter = Inverter(family, inverting_denoiser, settings, seed, device)
    return _Subject(family, inverter, resolution, sampled, pairs_per_shard, rewards, text)


def _choose_batch_size(subject: _Subject, trajectories: int, device: str) -> int:
    """Choose the batch size of ``--batch-size auto``."""
    largest = with_most_pixels(subject.sampled.pairs, subject.resolution)
    trials = trajectory_requests(largest, first_trajectory=trajectories)
    return choose_batch_size(
        lambda size: subject.inverter.invert([next(trials) for _ in range(size)]),
        subject.pairs_per_shard * trajectories,
        device,
    )


def _plan(options: PlanOptions, subject: _Subject, rate: Rate, batch_size: int) -> Plan:
    """Compute the plan from a measured rate and sizes by formula."""
    settings, family, sampled, flags = options.settings, subject.family, subject.sampled, options.projection
    trajectories = [
        draw_trajectory(pair, number, family, settings, options.trajectory.seed)
        for pair in sampled.pairs
        for number in range(settings.trajectories)
    ]
    formula = [
        forwards(trajectory.plan, settings, own_inverting_denoiser=options.models.inverting_unet is None)
        for trajectory in trajectories
    ]
    by_formula = [count for count in formula if count is not None]
    sizes = [
        trajectory_bytes(trajectory, family.latent_shape(*trajectory.pair.image_size), settings.storage)
        for trajectory in trajectories
    ]
    pairs_per_second = rate.trajectories / rate.seconds / settings.trajectories
    cpu = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    plan = Plan(
        device=torch.cuda.get_device_name() if options.running.device == "cuda" else cpu,
        model=options.models.model,
        resolution=subject.resolution,
        settings=settings,
        gpus=flags.gpus,
        price=flags.price,
        batch_size=batch_size,
        measured_trajectories=rate.trajectories,
        measured_seconds=rate.seconds,
        warm=rate.warm,
        buckets=list_buckets(Counter(pair.image_size for pair in sampled.pairs)) if settings.buckets else [],
        usable=len(sampled.pairs) / sampled.rows,
        sampled=sampled.rows,
        rewards=subject.rewards,
        pairs_per_second=pairs_per_second,
        states_a_trajectory=fmean(len(trajectory.plan.stored) for trajectory in trajectories),
        forwards_a_trajectory=2 * fmean(by_formula) if by_formula else rate.forwards / rate.trajectories,
        forwards_measured=not by_formula,
        bytes_a_trajectory=fmean(sizes),
        text=subject.text.plan(subject.text.prompts) if subject.text else None,
        peak_memory=rate.peak_memory,
        decoding_cores=sampled.decode_seconds * pairs_per_second,
    )
    projections = tuple(_project(count, plan, subject) for count in (sampled.total, *_PROJECTED))
    return plan.model_copy(update={"projections": projections})


def _project(count: int, plan: Plan, subject: _Subject) -> Projection:
    """Project to ``count`` input pairs."""
    text = None
    if subject.text:
        text = subject.text.plan(round(subject.text.prompts * count / subject.sampled.total))
    trajectories_per_pair = plan.usable * plan.settings.trajectories
    hours = count * plan.usable / plan.pairs_per_second / 3600
    hours += text.prompts * text.seconds_per_prompt / 3600 if text else 0
    return Projection(
        pairs=count,
        states=round(count * trajectories_per_pair * plan.states_a_trajectory),
        device_hours=hours,
        wall_hours=hours / plan.gpus,
        bytes=total_bytes(count, subject.pairs_per_shard, trajectories_per_pair * plan.bytes_a_trajectory),
        text_bytes=text.bytes if text else 0,
        shards=num_shards(count, subject.pairs_per_shard),
        dollars=None if plan.price is None else hours * plan.price,
    )
