"""The first stage of ``invert`` and ``steps`` with ``--text stored``: each distinct prompt is encoded once.

Actors of its own hold the text encoders alone and end before those of the second stage start. It is a run of its own in
``text/``, whose records are kept until the manifest lists its files.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa
import ray

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.memory import is_out_of_memory
from smpo_pipeline.jobs.cluster.pools import model_pool
from smpo_pipeline.jobs.cluster.run_units import run_units
from smpo_pipeline.jobs.cluster.session import set_reproducible_arithmetic
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.invert.models import ModelIdentity, load_text_encoders
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.invert.prompts import PROMPTS_PER_FILE, encode_batches
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord, unit_records
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.steps.options import StepsOptions
from smpo_schemas.manifest import MANIFEST_FILE, TEXT_FOLDER, StoredTextEntry, TextFile
from smpo_schemas.shards.text import (
    TEXT_DTYPES,
    TEXT_INDEX,
    text_file_name,
    write_text,
    write_text_index,
)


def text_run(options: InvertOptions | StepsOptions, identity: dict[str, Any] | None = None) -> Run:
    """Return the stage's run, which is never finished by itself: see :meth:`Run.remove`."""
    return Run(options.out / TEXT_FOLDER, MANIFEST_FILE, identity or {})


def store_text(
    options: InvertOptions | StepsOptions, prompts: Sequence[str], model: ModelIdentity, weights: int
) -> StoredTextEntry:
    """Write the files of ``text/`` that are missing, and the index.

    Args:
        options: of the command, with a resolved device.
        prompts: distinct ones, in a fixed order.
        model: identity of the models that the driver loaded.
        weights: bytes of the text encoders.

    Raises:
        UserError: another run's files are there, a stage raised it, or two prompts have one hash.
    """
    running, dtype = options.running, options.settings.dtype
    run = text_run(
        options,
        {
            "job": "invert",
            "prompts": len(prompts),
            "prompts_sha256": sha256_json(prompts),
            "text": model.text,
            "dtype": dtype,
            "empty_prompt": options.storing.empty_prompt,
        },
    )
    run.open(overwrite=False, patterns=())
    sizes = [len(prompts[start : start + PROMPTS_PER_FILE]) for start in range(0, len(prompts), PROMPTS_PER_FILE)]

    def build(source: ray.data.Dataset, work_log: WorkLog) -> ray.data.Dataset:
        pool = model_pool(running.chosen_device, running.concurrency, running.ray_address, weights, len(sizes))
        kwargs = {
            "options": options,
            "model": model,
            "run": run,
            "prompts": ray.put(list(prompts)),
            "work_log": work_log,
        }
        return source.map_batches(
            TextActor, batch_size=1, batch_format="pyarrow", fn_constructor_kwargs=kwargs, **pool.options()
        )

    done = run_units(run, sizes, build, unit_records, title="text", address=running.ray_address, noun="prompts")
    entries = [dict(record.entry or {}) for record in done]
    cut = [is_cut for entry in entries for is_cut in entry.pop("cut")]
    files = [TextFile.model_validate(entry) for entry in entries]
    index = write_text_index(run.out / TEXT_INDEX, prompts, cut, PROMPTS_PER_FILE)
    return StoredTextEntry(
        dtype=cast("Any", str(TEXT_DTYPES[dtype]).removeprefix("torch.")),
        prompts=len(prompts),
        bytes=index.bytes + sum(file.bytes for file in files),
        index=index,
        files=files,
    )


class TextActor:
    """Holds the text encoders; turns a unit of prompts into a file and commits it."""

    def __init__(
        self,
        options: InvertOptions | StepsOptions,
        model: ModelIdentity,
        run: Run,
        prompts: ray.ObjectRef,
        work_log: WorkLog,
    ) -> None:
        """Load the text encoders; see :func:`store_text` for the arguments."""
        set_reproducible_arithmetic(options.running.chosen_device)
        self._family = load_text_encoders(options)
        # Not raised here: Ray retries a constructor that raises five times.
        self._model_differs = not model.has_text_of(self._family)
        self._family.to(options.running.chosen_device)
        self._options, self._run, self._guard = options, run, CrashGuard(work_log)
        self._prompts: list[str] = ray.get(prompts)

    def __call__(self, row: pa.Table) -> pa.Table:
        """Encode and commit the unit of a one-row table; return its record as JSON.

        Raises:
            UserError: the model's files are not those that the driver found, or memory is too small.
        """
        if self._model_differs:
            raise UserError(
                f"--model {self._options.models.model}: its text encoders on {socket.gethostname()} differ from those "
                "where the command was started; give every machine the same files"
            )
        unit = row["unit"][0].as_py()
        with self._guard.working(("text", unit), f"encoding prompts of unit {unit}; too little memory?"):
            record = self._run.committed(unit) or self._make(unit)
        return pa.table({"record": [record.model_dump_json()]})

    def _make(self, unit: int) -> UnitRecord:
        prompts = self._prompts[unit * PROMPTS_PER_FILE : (unit + 1) * PROMPTS_PER_FILE]
        dtype = self._options.settings.dtype
        try:
            rows = [row for batch in encode_batches(self._family, prompts, dtype) for row in batch]
            self._run.require_current()
            file = write_text(self._run.out / text_file_name(unit), prompts, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"too little memory for the text encoders on {socket.gethostname()}: {error}; is another program using "
                "it? Committed files are kept, run the same command again to resume, or with --device cpu"
            ) from error
        record = UnitRecord(
            unit=unit,
            pairs_in=len(prompts),
            pairs=len(prompts),
            rejects=[],
            entry={**file.model_dump(), "cut": [self._family.cuts(prompt) for prompt in prompts]},
        )
        self._run.commit(record)
        return record
