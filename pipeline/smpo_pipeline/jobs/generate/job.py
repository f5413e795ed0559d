"""``smpo-pipeline generate`` on Ray Data: actors that sample a unit's images -> tasks that encode and store them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import ray
from rich.console import Console

from smpo_common.errors import UserError
from smpo_common.files import sha256_file
from smpo_common.retry import retry_transient
from smpo_models.family import Family
from smpo_pipeline.generation.generator import latent_shape, quiet_libraries
from smpo_pipeline.generation.prompts import PromptFile, read_prompt_file
from smpo_pipeline.jobs.cluster.pools import model_pool
from smpo_pipeline.jobs.cluster.run_units import run_units
from smpo_pipeline.jobs.cluster.session import resolve_device
from smpo_pipeline.jobs.generate.actor import GenerateActor, SamplingWork
from smpo_pipeline.jobs.generate.models import (
    GeneratorIdentity,
    choices,
    choose_settings,
    describe_generator,
    load,
    origin_of,
    weight_bytes,
)
from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.jobs.generate.parts import Prompts, Storing, prompt_rows, write_row
from smpo_pipeline.jobs.generate.stages import sampled, stored
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord, unit_records
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.generation.candidates import (
    CANDIDATES_FILE,
    CANDIDATES_VERSION,
    NOT_CARRIED,
    Candidates,
    CandidatesPart,
    GenerationSettings,
    read_candidates,
    write_candidates,
)
from smpo_schemas.rejects import REJECTS_FILE, count_reasons, write_rejects

_PATTERNS = ("candidates-*.parquet", "latents-*.safetensors", REJECTS_FILE)


@dataclass(frozen=True)
class _Checked:
    """Facts that are needed before any work starts; ``weights``: bytes of the model's."""

    settings: GenerationSettings
    model: GeneratorIdentity
    family: Family
    weights: int
    prompts: PromptFile
    further: pa.Table
    """The prompts' columns that are carried through."""


def generate(options: GenerateOptions) -> Candidates:
    """Generate the images of all prompts, or continue an unfinished run of the same command.

    Raises:
        UserError: the prompts, the model or the output directory cannot be used, or every prompt was rejected.
    """
    running = options.running
    options = options.replace(device=resolve_device(running.device, running.ray_address))
    options.out.exists()  # fails early if the bucket does not exist
    quiet_libraries()
    checked = _check(options)
    run = Run(options.out, CANDIDATES_FILE, _identity(options, checked))
    with locked(options.out):
        if not run.open(overwrite=running.overwrite, patterns=_PATTERNS):
            return read_candidates(options.out)
        for line in _choices(options, checked):
            Console(markup=False).print(line, highlight=False, soft_wrap=True)
        records = _run(options, run, checked)
        candidates = _finish(options, records, checked)
        run.finish()
        return candidates


def _check(options: GenerateOptions) -> _Checked:
    """Check the settings against the model's configs, then load it on the driver to identify it."""
    prompts = read_prompt_file(options.prompts, options.running.limit)
    further = prompts.columns.drop_columns([name for name in prompts.columns.column_names if name in NOT_CARRIED])
    family, settings = choose_settings(options)
    generator = load(options.loading, "cpu", settings.dtype)
    model = describe_generator(options, generator, settings.dtype)
    return _Checked(settings, model, family, weight_bytes(generator), prompts, further)


def _identity(options: GenerateOptions, checked: _Checked) -> dict[str, Any]:
    path = options.prompts
    listing = [[str(path), len(checked.prompts.rows), path.stat().st_size, sha256_file(path)]]
    return {
        "job": "generate",
        "schema_version": CANDIDATES_VERSION,
        "input": {"files": listing, "limit": options.running.limit},
        "model": checked.model.model_dump(),
        "generation": checked.settings.model_dump(),
        "prompts_per_file": options.prompts_per_file,
    }


def _choices(options: GenerateOptions, checked: _Checked) -> list[str]:
    """Describe the job for the user."""
    left_out = [name for name in checked.prompts.columns.column_names if name in NOT_CARRIED]
    return [
        choices(options, checked.settings, len(checked.prompts.rows)),
        *([f"columns of the prompts that are not carried through: {', '.join(left_out)}"] if left_out else []),
    ]


def _run(options: GenerateOptions, run: Run, checked: _Checked) -> list[UnitRecord]:
    running, settings, per_unit = options.running, checked.settings, options.prompts_per_file
    total = len(checked.prompts.rows)
    sizes = [min(per_unit, total - start) for start in range(0, total, per_unit)]
    shape = latent_shape(checked.family, settings)
    rows = prompt_rows(checked.prompts.rows)

    def build(source: ray.data.Dataset, work_log: WorkLog) -> ray.data.Dataset:
        device = running.chosen_device
        pool = model_pool(device, running.concurrency, running.ray_address, checked.weights, len(sizes))
        prompts = Prompts(options.prompts, per_unit, ray.put((rows, checked.further)))
        work = SamplingWork(options.loading, settings, device, running.batch_size, prompts, run, work_log)
        storing = Storing(settings, checked.model.denoiser, origin_of(checked.model, settings), shape)
        write = partial(write_row, prompts=prompts, storing=storing, run=run, work_log=work_log)
        unit_bytes = max(sizes) * settings.images_per_prompt * settings.image_bytes(shape)
        made = sampled(source, GenerateActor, work, checked.model.content, pool)
        return stored(made, write, pool, unit_bytes, "a smaller --prompts-per-file")

    return run_units(
        run,
        sizes,
        build,
        unit_records,
        title="generate",
        address=running.ray_address,
        max_reject_rate=running.max_reject_rate,
        noun="prompts",
    )


@retry_transient
def _finish(options: GenerateOptions, records: Sequence[UnitRecord], checked: _Checked) -> Candidates:
    """Write the rejects, then ``candidates.json``, which marks the run as finished."""
    rejects = [reject for record in records for reject in record.rejects]
    write_rejects(options.out / REJECTS_FILE, rejects)
    parts = [CandidatesPart.model_validate(record.entry) for record in records if record.entry]
    if not parts:
        first = f"; the first: {rejects[0].source}: {rejects[0].reason}" if rejects else ""
        raise UserError(f"no prompt is left, {len(rejects)} were rejected (see {options.out / REJECTS_FILE}){first}")
    prompts = sum(part.prompts for part in parts)
    candidates = Candidates(
        schema_version=CANDIDATES_VERSION,
        model=checked.model.info(),
        columns=checked.further.column_names,
        parts=parts,
        prompts_in=sum(record.pairs_in for record in records),
        prompts=prompts,
        images=prompts * checked.settings.images_per_prompt,
        rejected=len(rejects),
        rejected_reasons=count_reasons(rejects),
        versions={name: version(name) for name in ("smpo-diffusion", "torch", "diffusers", "transformers", "numpy")},
        **checked.settings.model_dump(),
    )
    write_candidates(options.out, candidates)
    return candidates
