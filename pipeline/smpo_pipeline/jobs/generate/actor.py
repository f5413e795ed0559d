"""Turn units of prompts into pixels, which other workers encode and store: in model actors, or in this process."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from smpo_common.errors import UserError
from smpo_pipeline.generation.generator import Generator, Sampled, Wanted, sampling_trials, state_nodes
from smpo_pipeline.generation.source import Loading
from smpo_pipeline.isolation import run_alone
from smpo_pipeline.jobs.batches import Batches
from smpo_pipeline.jobs.cells import bytes_array, list_cell
from smpo_pipeline.jobs.cluster.session import set_reproducible_arithmetic
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.generate.models import content_of, load
from smpo_pipeline.jobs.generate.parts import STAGE, Prompts, unit_rows
from smpo_pipeline.jobs.record.progress import Reporter
from smpo_pipeline.jobs.record.run_record import Units
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.generation.candidates import GenerationSettings
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.rejects import Reject


@dataclass(frozen=True)
class SamplingWork:
    """What the workers of a job share.

    Attributes:
        loading: what the model is loaded from.
        settings: of the images.
        device: cpu or cuda.
        batch_size: images per model call; None: to be chosen.
        prompts: of the job.
        run: where units are committed.
        work_log: of the job.
    """

    loading: Loading
    settings: GenerationSettings
    device: str
    batch_size: int | None
    prompts: Prompts
    run: Units
    work_log: WorkLog


class UnitSampler:
    """Samples the images of a unit's prompts with a loaded model."""

    def __init__(self, generator: Generator, work: SamplingWork) -> None:
        """Take a model that is on the device."""
        self._generator, self._settings, self._device = generator, work.settings, work.device
        self._prompts, self._run, self._named = work.prompts, work.run, work.loading.source.named
        self._rows = work.prompts.rows()
        self._guard, self._reporter = CrashGuard(work.work_log), Reporter(work.work_log)
        self._batches = Batches(work.batch_size, work.device, work.run.out, "image")

    def __call__(self, row: pa.Table) -> pa.Table:
        """Sample the unit of a one-row table; return it as one row for the task that encodes and stores it.

        Raises:
            UserError: memory is too small.
        """
        unit = row["unit"][0].as_py()
        if self._run.committed(unit):
            return pa.table({"unit": [unit]})
        made = self._make(unit)
        made = made.append_column("seconds", pa.array([self._batches.seconds], pa.list_(pa.float64())))
        self._batches.start_unit()
        return made

    def _make(self, unit: int) -> pa.Table:
        rows = unit_rows(self._rows, unit, self._prompts.per_unit)
        failed: dict[int, str] = {place: row["reason"] for place, row in enumerate(rows) if row["reason"]}
        wanted = [
            (place, (row["prompt"], index))
            for place, row in enumerate(rows)
            if place not in failed
            for index in range(self._settings.images_per_prompt)
        ]
        crashing = self._guard.crashing_items(unit, self._sample_alone, (item for _, item in wanted))
        failed |= {wanted[position][0]: reason for position, reason in crashing.items()}
        with self._guard.working(unit, f"generating images of unit {unit}; too little memory? Reduce --batch-size"):
            made = self._sample_all(unit, [item for item in wanted if item[0] not in failed], failed)
        rejects = [
            Reject(pair_id=None, source=f"{self._prompts.path}:{rows[place]['row']}", stage=STAGE, reason=reason)
            for place, reason in sorted(failed.items())
        ]
        return _as_row(unit, {place: made[place] for place in made if place not in failed}, rejects)

    def _sample_all(
        self, unit: int, wanted: Sequence[tuple[int, Wanted]], failed: dict[int, str]
    ) -> dict[int, list[Sampled]]:
        """Sample the images by the places of their prompts in the unit; add the places that fail to ``failed``."""
        made: dict[int, list[Sampled]] = {place: [] for place, _ in wanted}
        if wanted and not self._batches.chosen:
            try_batch = sampling_trials(self._generator, [item for _, item in wanted], self._settings)
            self._batches.choose_size(try_batch, self._prompts.per_unit * self._settings.images_per_prompt)
        done = 0
        while done < len(wanted):
            batch = wanted[done : done + self._batches.size]
            outcome = self._batches.run(self._sample, [item for _, item in batch])
            images = {
                position: image
                for positions, some in outcome.results
                for position, image in zip(positions, some, strict=True)
            }
            for position, (place, (_, index)) in enumerate(batch):
                if position in outcome.failed:
                    failed.setdefault(place, outcome.failed[position])
                elif not torch.isfinite(images[position].latents_Chw).all():
                    failed.setdefault(place, f"{RejectKind.NOT_FINITE}: latents of image {index}")
                else:
                    made[place].append(images[position])
            done += len(batch)
            self._reporter.report(unit, None, done / self._settings.images_per_prompt)
        return made

    def _sample(self, batch: Sequence[Wanted]) -> list[Sampled]:
        nodes = [state_nodes(self._settings, prompt) for prompt, _ in batch] if self._settings.num_states else None
        return self._generator.sample(batch, self._settings, nodes)

    def _sample_alone(self, wanted: Wanted) -> None:
        run_alone(self._sample, wanted, self._device)


class GenerateActor(UnitSampler):
    """A worker that loads the model."""

    def __init__(self, work: SamplingWork, content: Mapping[str, Any]) -> None:
        """Load the model.

        Args:
            work: of the job.
            content: of the model that the driver loaded (:func:`smpo_pipeline.jobs.generate.models.content_of`).
        """
        set_reproducible_arithmetic(work.device)
        generator = load(work.loading, "cpu", work.settings.dtype)
        # Not raised here: Ray retries a constructor that raises five times.
        self._model_differs = content_of(generator) != content
        generator.pipeline.to(work.device)
        super().__init__(generator, work)

    def __call__(self, row: pa.Table) -> pa.Table:
        """See the base class.

        Raises:
            UserError: the model's files are not those that the driver found, or memory is too small.
        """
        if self._model_differs:
            raise UserError(
                f"{self._named}: its files on {socket.gethostname()}, or those of its base or negative model, differ "
                "from those where the command was started; give every machine the same files"
            )
        return super().__call__(row)


def _as_row(unit: int, made: Mapping[int, Sequence[Sampled]], rejects: Sequence[Reject]) -> pa.Table:
    """Pack a unit into one row: places of its prompts, and of each image pixels, latents and states."""
    images = [image for place in made for image in made[place]]
    cells: dict[str, Any] = {
        "unit": pa.array([unit]),
        "rejects": pa.array([json.dumps([reject.model_dump() for reject in rejects])]),
        "places": list_cell(pa.array(list(made), pa.int64())),
        "pixels": list_cell(_joined([np.asarray(image.image.convert("RGB")) for image in images])),
        "latents": list_cell(_joined([image.latents_Chw.numpy() for image in images])),
        "states": list_cell(_joined([state.numpy() for image in images for state in image.states_Chw.values()])),
        "timesteps": list_cell(pa.array([time for image in images for time in image.states_Chw], pa.float64())),
    }
    return pa.table(cells)


def _joined(arrays: Sequence[np.ndarray]) -> pa.LargeBinaryArray:
    """Return the bytes of each array, in one buffer: the only copy that is made of them."""
    joined = np.concatenate([np.empty(0, np.uint8), *(array.reshape(-1).view(np.uint8) for array in arrays)])
    return bytes_array(joined, np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64))
