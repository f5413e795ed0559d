"""The model actors of ``generate``: turn a unit of prompts into pixels, which other workers encode and store."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from smpo_common.errors import UserError
from smpo_pipeline.generation.generator import Sampled, Wanted, sampling_trials, state_nodes
from smpo_pipeline.isolation import run_alone
from smpo_pipeline.jobs.batches import Batches
from smpo_pipeline.jobs.cells import bytes_array, list_cell
from smpo_pipeline.jobs.cluster.session import set_reproducible_arithmetic
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.generate.models import GeneratorIdentity, load
from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.jobs.generate.parts import STAGE, Prompts, unit_rows
from smpo_pipeline.jobs.record.progress import Reporter
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.candidates import GenerationSettings
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.rejects import Reject


class GenerateActor:
    """Holds the model; samples the images of a unit's prompts."""

    def __init__(
        self,
        options: GenerateOptions,
        settings: GenerationSettings,
        model: GeneratorIdentity,
        prompts: Prompts,
        run: Run,
        work_log: WorkLog,
    ) -> None:
        """Load the model.

        Args:
            options: of the command, with a resolved device.
            settings: of the images.
            model: identity of the model that the driver loaded.
            prompts: of the job, in Ray's object store.
            run: where units are committed.
            work_log: of the job.
        """
        self._device = options.running.chosen_device
        set_reproducible_arithmetic(self._device)
        generator = load(options, "cpu", settings.dtype)
        # Not raised here: Ray retries a constructor that raises five times.
        self._model_differs = not model.is_of(generator)
        generator.pipeline.to(self._device)
        self._generator, self._settings, self._options = generator, settings, options
        self._rows, _ = ray.get(prompts.tables)
        self._prompts, self._run = prompts, run
        self._guard, self._reporter = CrashGuard(work_log), Reporter(work_log)
        self._batches = Batches(options.running.batch_size, self._device, run.out, "image")

    def __call__(self, row: pa.Table) -> pa.Table:
        """Sample the unit of a one-row table; return it as one row for :func:`write_row`.

        Raises:
            UserError: the model's files are not those that the driver found, or memory is too small.
        """
        if self._model_differs:
            raise UserError(
                f"--model {self._options.model}: its files on {socket.gethostname()} (or those of --unet, --lora, "
                "--negative) differ from those where the command was started; give every machine the same files"
            )
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
    """The bytes of each array; the only copy of all of them."""
    joined = np.concatenate([np.empty(0, np.uint8), *(array.reshape(-1).view(np.uint8) for array in arrays)])
    return bytes_array(joined, np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64))
