"""Sample a model's images for an evaluation: on all GPUs through Ray, or on one device in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch
from rich.console import Console

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.evaluation import Evaluation
from smpo_pipeline.generation.generator import Generator, latent_shape
from smpo_pipeline.generation.prompts import PromptRow
from smpo_pipeline.generation.source import ModelSource
from smpo_pipeline.jobs.cluster.pools import model_pool
from smpo_pipeline.jobs.cluster.run_units import run_units, run_units_here
from smpo_pipeline.jobs.cluster.session import resolve_device
from smpo_pipeline.jobs.evaluate.pictures import PictureRun, write_pictures
from smpo_pipeline.jobs.generate.actor import GenerateActor, SamplingWork, UnitSampler
from smpo_pipeline.jobs.generate.models import content_of, load, weight_bytes
from smpo_pipeline.jobs.generate.parts import Prompts, prompt_rows
from smpo_pipeline.jobs.generate.stages import sampled, stored
from smpo_pipeline.jobs.record.batch_sizes import pop_batch_sizes
from smpo_pipeline.jobs.record.run_record import UnitRecord, unit_records
from smpo_pipeline.jobs.record.work_log import WorkLog

_IMAGES_PER_UNIT = 256
_UNITS_PER_ACTOR = 4
"""Least number of units for each actor, so that none waits long for the last one."""

_Share = Callable[[WorkLog], SamplingWork]
"""Makes what workers share, with their log."""


def sample_model(evaluation: Evaluation, model: ModelSource, device: str) -> str:
    """Sample the images of a model that are missing; return the fingerprint of its denoiser.

    Args:
        evaluation: the evaluation.
        model: one of its models.
        device: of this process: cpu or cuda.

    Raises:
        UserError: the model cannot be loaded, memory is too small, or a prompt gets no images.
    """
    if evaluation.ray_address:
        device = evaluation.device or resolve_device(None, evaluation.ray_address)
    settings, loading, files = evaluation.generation(), evaluation.loading(model), evaluation.pictures(model.name)
    actors = evaluation.concurrency or (torch.cuda.device_count() if device == "cuda" else 1)
    on_ray = bool(evaluation.ray_address) or actors > 1
    generator = load(loading, "cpu" if on_ray else device, settings.dtype)
    fingerprint = generator.fingerprint()
    run = PictureRun(files, {"origin": evaluation.origin(model.name), "denoiser": fingerprint})
    files.claim(run.origin, evaluation.metadata)
    lacking = evaluation.lacking(model.name)
    if not lacking:
        return fingerprint
    per_unit = prompts_per_unit(len(lacking), settings.images_per_prompt, evaluation.batch_size, actors)
    sizes = [min(per_unit, len(lacking) - start) for start in range(0, len(lacking), per_unit)]
    rows = prompt_rows([PromptRow(number, evaluation.settings.prompts[number]) for number in lacking])
    prompts = Prompts("--prompts", per_unit, (rows, pa.table({})))
    share = partial(SamplingWork, loading, settings, device, evaluation.batch_size, prompts, run)
    if on_ray:
        content, weights = content_of(generator), weight_bytes(generator)
        unit_bytes = (
            per_unit * settings.images_per_prompt * settings.image_bytes(latent_shape(generator.family, settings))
        )
        del generator  # each worker loads its own
        records = _sample_on_ray(evaluation, share, run, content, weights, unit_bytes, sizes, f"sample {model.name}")
    else:
        records = _sample_here(generator, share, run, sizes, f"sample {model.name}")
    for line in pop_batch_sizes(files.folder, evaluation.batch_size, "images"):
        Console(markup=False).print(line, soft_wrap=True)
    _require_all(evaluation, model, records)
    return fingerprint


def prompts_per_unit(prompts: int, images_per_prompt: int, batch_size: int, actors: int) -> int:
    """Choose the size of units: whole batches, several units for each actor, and not too many images in memory."""
    whole = batch_size // math.gcd(batch_size, images_per_prompt)
    share = prompts if actors == 1 else math.ceil(prompts / (_UNITS_PER_ACTOR * actors))
    most = min(_IMAGES_PER_UNIT // images_per_prompt, share)
    return max(whole, most - most % whole)


def _sample_here(
    generator: Generator, share: _Share, run: PictureRun, sizes: Sequence[int], title: str
) -> list[UnitRecord]:
    def make(work_log: WorkLog) -> Callable[[pa.Table], pa.Table]:
        work = share(work_log)
        sampler = UnitSampler(generator, work)
        return lambda row: write_pictures(sampler(row), work.prompts, work.settings, run, work_log)

    return run_units_here(run, sizes, make, unit_records, title=title, noun="prompts")


def _sample_on_ray(
    evaluation: Evaluation,
    share: _Share,
    run: PictureRun,
    content: Mapping[str, Any],
    weights: int,
    unit_bytes: int,
    sizes: Sequence[int],
    title: str,
) -> list[UnitRecord]:
    address = evaluation.ray_address

    def build(source: ray.data.Dataset, work_log: WorkLog) -> ray.data.Dataset:
        work = share(work_log)
        pool = model_pool(work.device, evaluation.concurrency, address, weights, len(sizes))
        write = partial(write_pictures, prompts=work.prompts, settings=work.settings, run=run, work_log=work_log)
        made = sampled(source, GenerateActor, work, content, pool)
        return stored(made, write, pool, unit_bytes, "a smaller --batch-size or --images-per-prompt")

    return run_units(run, sizes, build, unit_records, title=title, address=address, noun="prompts")


def _require_all(evaluation: Evaluation, model: ModelSource, records: Sequence[UnitRecord]) -> None:
    """Check that every image is there.

    Raises:
        UserError: one is not.
    """
    rejects = [reject for record in records for reject in record.rejects]
    if rejects:
        number = int(rejects[0].source.rpartition(":")[2])
        raise UserError(
            f"{model.named}: {len(rejects)} of {len(evaluation.settings.prompts)} prompts get no images; the first: "
            f"{evaluation.settings.prompts[number]!r}: {rejects[0].reason}"
        )
    if lacking := evaluation.lacking(model.name):
        path = evaluation.file(model.name, lacking[0], 0)
        raise UserError(f"{path} is missing, though it was sampled: give all machines of the cluster one --out")
