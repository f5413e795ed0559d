"""Project hours, bytes and dollars of a generation from a measured rate."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from itertools import count, islice
from statistics import fmean

import numpy as np
import torch
from rich.console import Console

from smpo_common.errors import UserError
from smpo_models.memory import is_out_of_memory
from smpo_pipeline.batch_size import choose_batch_size
from smpo_pipeline.generation.encoding import encode_image
from smpo_pipeline.generation.generator import Sampled, Wanted, latent_shape, quiet_libraries, sampling_trials
from smpo_pipeline.generation.prompts import read_prompt_file
from smpo_pipeline.isolation import FAILURES
from smpo_pipeline.jobs.generate.models import choices, choose_settings, load
from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.planning.rate import measure_rate
from smpo_schemas.frozen import FrozenModel
from smpo_schemas.generation.candidates import GenerationSettings

_PROJECTED = (10_000, 1_000_000)
"""Numbers of prompts to project for, besides the file's own."""

_ENCODED = 32
"""Most images whose files are measured."""


class GenerationProjection(FrozenModel):
    """The cost of a number of prompts.

    Attributes:
        prompts, images: their numbers.
        device_hours: summed over devices.
        wall_hours: with ``gpus`` devices that are never idle.
        bytes, files: size and number of the files, with what ``--keep`` stores.
        dollars: device hours times the price; None without a price.
    """

    prompts: int
    images: int
    device_hours: float
    wall_hours: float
    bytes: int
    files: int
    dollars: float | None


class GenerationPlan(FrozenModel):
    """Measurements and projections.

    Attributes:
        device: its name.
        model, settings, batch_size, gpus, price: from the flags.
        images_per_second: rate of one device.
        measured_images, measured_seconds, warm, peak_memory: see :class:`smpo_pipeline.planning.rate.Rate`.
        forwards_per_image: forwards of the denoiser, one per row of its batch.
        bytes_per_image: mean size of its file, and what ``--keep`` stores.
        projections: for the prompts of the file, and for more.
    """

    device: str
    model: str
    settings: GenerationSettings
    batch_size: int
    gpus: int
    price: float | None
    images_per_second: float
    measured_images: int
    measured_seconds: float
    warm: bool
    peak_memory: int | None
    forwards_per_image: float
    bytes_per_image: float
    projections: tuple[GenerationProjection, ...]


def plan_generation(options: GenerateOptions, console: Console) -> GenerationPlan:
    """Print what was chosen by default, sample on the device, and project.

    Raises:
        UserError: the prompts, the model or the device cannot be used.
    """
    quiet_libraries()
    rows = read_prompt_file(options.prompts, options.running.limit).rows
    prompts = [row.prompt for row in rows if row.prompt]
    family, settings = choose_settings(options)
    console.print(choices(options, settings, len(prompts)), highlight=False, soft_wrap=True)
    device = options.running.chosen_device
    generator = load(options.loading, device, settings.dtype)
    size = options.running.batch_size
    if size is None:
        most = options.prompts_per_file * settings.images_per_prompt
        wanted = next(_batches(prompts, settings.images_per_prompt, most))
        size = choose_batch_size(sampling_trials(generator, wanted, settings), most, device)
    sampled: list[Sampled] = []

    def make(batch: Sequence[Wanted]) -> None:
        images = generator.sample(batch, settings)
        sampled.extend(images[: _ENCODED - len(sampled)])

    batches = _batches(prompts, settings.images_per_prompt, size)
    try:
        rate = measure_rate(make, [generator.denoiser], batches, options.planning.seconds, device)
    except FAILURES as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--batch-size {size}: too little memory ({error}); try --batch-size auto") from error
    shape = latent_shape(family, settings)
    encoded = [len(encode_image(np.asarray(each.image.convert("RGB")), settings.image_format)) for each in sampled]
    kept = settings.image_bytes(shape) - 3 * settings.resolution**2
    cpu = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    measured = {
        "images_per_second": rate.trajectories / rate.seconds,
        "bytes_per_image": fmean(encoded) + kept,
    }
    return GenerationPlan(
        device=torch.cuda.get_device_name() if device == "cuda" else cpu,
        model=options.model,
        settings=settings,
        batch_size=size,
        gpus=options.planning.gpus,
        price=options.planning.price,
        measured_images=rate.trajectories,
        measured_seconds=rate.seconds,
        warm=rate.warm,
        peak_memory=rate.peak_memory,
        forwards_per_image=rate.forwards / rate.trajectories,
        projections=tuple(_project(number, options, **measured) for number in (len(prompts), *_PROJECTED)),
        **measured,
    )


def _batches(prompts: Sequence[str], images_per_prompt: int, size: int) -> Iterator[list[Wanted]]:
    """Yield batches without end; once the prompts are used up, of further images of them."""
    wanted = (
        (prompt, turn * images_per_prompt + index)
        for turn in count()
        for prompt in prompts
        for index in range(images_per_prompt)
    )
    while True:
        yield list(islice(wanted, size))


def _project(
    prompts: int, options: GenerateOptions, *, images_per_second: float, bytes_per_image: float
) -> GenerationProjection:
    images = prompts * options.sampling.images_per_prompt
    hours, price = images / images_per_second / 3600, options.planning.price
    return GenerationProjection(
        prompts=prompts,
        images=images,
        device_hours=hours,
        wall_hours=hours / options.planning.gpus,
        bytes=round(images * bytes_per_image),
        files=math.ceil(prompts / options.prompts_per_file),
        dollars=None if price is None else hours * price,
    )
