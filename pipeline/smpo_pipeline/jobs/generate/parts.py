"""Encode and store a unit's images: a file of candidates and, with ``--keep``, one of latents and states.

Nothing here imports torch: encoding workers start fast and stay small.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from safetensors.numpy import save_file

from smpo_common.files import atomic_path, sha256_file
from smpo_common.store_path import AnyPath
from smpo_pipeline.generation.encoding import encode_image
from smpo_pipeline.generation.prompts import PromptRow
from smpo_pipeline.jobs.cells import byte_views, cell_values
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.frozen import StoredFile
from smpo_schemas.generation.candidates import (
    CANDIDATES_SCHEMA,
    CandidatesPart,
    GenerationSettings,
    candidate_pair_id,
    kept_name,
    part_name,
)
from smpo_schemas.pairs import image_id
from smpo_schemas.rejects import Reject

STAGE = "generate"

_ROWS_PER_GROUP = 8
"""Rows of a row group, which is read as a whole: 16 images."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of the job.

    Attributes:
        path: their file, or what names it.
        per_unit: prompts of a unit.
        tables: two tables with one row per prompt: ``row``, ``prompt`` and ``reason``; and the further columns that are
            carried through. Or Ray's reference to them.
    """

    path: AnyPath | str
    per_unit: int
    tables: tuple[pa.Table, pa.Table] | ray.ObjectRef

    def rows(self) -> pa.Table:
        """Return the table of ``row``, ``prompt`` and ``reason``."""
        return self.both()[0]

    def both(self) -> tuple[pa.Table, pa.Table]:
        """Return both tables."""
        return self.tables if isinstance(self.tables, tuple) else ray.get(self.tables)


def prompt_rows(rows: Sequence[PromptRow]) -> pa.Table:
    """Make the table of ``row``, ``prompt`` and ``reason``."""
    schema = pa.schema([("row", pa.int64()), ("prompt", pa.string()), ("reason", pa.string())])
    return pa.table({name: [getattr(row, name) for row in rows] for name in schema.names}, schema=schema)


@dataclass(frozen=True)
class Storing:
    """How images are stored.

    Attributes:
        settings: of the images.
        model: the denoiser's fingerprint.
        origin: fingerprint of everything that decides the images of a prompt.
        noise_shape: (C, h, w) of latents.
    """

    settings: GenerationSettings
    model: str
    origin: str
    noise_shape: tuple[int, int, int]


def unit_rows(table: pa.Table, unit: int, per_unit: int) -> list[dict[str, Any]]:
    """Return the rows of a unit."""
    return table.slice(unit * per_unit, per_unit).to_pylist()


def write_row(row: pa.Table, prompts: Prompts, storing: Storing, run: Run, work_log: WorkLog) -> pa.Table:
    """Encode, write and commit the unit of an actor's row; return its record as JSON."""
    unit = row["unit"][0].as_py()
    record = run.committed(unit)
    if record is None:
        with CrashGuard(work_log).working(("write", unit), f"encoding the images of unit {unit}"):
            record = _write(unit, row, prompts, storing, run)
    return pa.table({"record": [record.model_dump_json()]})


def encoded(row: pa.Table, settings: GenerationSettings) -> tuple[list[int], list[bytes], list[Reject]]:
    """Encode the images of an actor's row.

    Returns:
        The places in the unit of the prompts that have images; their images, prompt by prompt; the rejects.
    """
    rejects = [Reject(**reject) for reject in json.loads(row["rejects"][0].as_py())]
    places, side = cell_values(row, "places").to_pylist(), settings.resolution
    pixels = byte_views(cell_values(row, "pixels")) if places else ()
    return places, [encode_image(each.reshape(side, side, 3), settings.image_format) for each in pixels], rejects


def _write(unit: int, row: pa.Table, prompts: Prompts, storing: Storing, run: Run) -> UnitRecord:
    places, images, rejects = encoded(row, storing.settings)
    entry = None
    if places:
        # Workers may outlive their run.
        run.require_current()
        kept = _write_kept(run.out / kept_name(unit), row, images, storing) if storing.settings.keep else None
        entry = _write_part(unit, places, images, prompts, storing, run.out, kept)
    record = UnitRecord(
        unit=unit,
        pairs_in=len(places) + len(rejects),
        pairs=len(places),
        rejects=rejects,
        entry=entry.model_dump() if entry else None,
        seconds=tuple(row["seconds"][0].as_py()),
    )
    run.commit(record)
    return record


def _noise(index: int, storing: Storing) -> dict[str, Any]:
    return {"seed": storing.settings.seed, "index": index, "shape": list(storing.noise_shape)}


def _write_part(
    unit: int,
    places: Sequence[int],
    images: Sequence[bytes],
    prompts: Prompts,
    storing: Storing,
    out: AnyPath,
    kept: StoredFile | None,
) -> CandidatesPart:
    num_images = storing.settings.images_per_prompt
    table, further = prompts.both()
    texts = table["prompt"].slice(unit * prompts.per_unit, prompts.per_unit).to_pylist()
    rows = [
        {
            "pair_id": candidate_pair_id(storing.origin, texts[place], index // 2),
            "prompt": texts[place],
            "image_0": images[number * num_images + index],
            "image_1": images[number * num_images + index + 1],
            "noise_0": _noise(index, storing),
            "noise_1": _noise(index + 1, storing),
            **dict.fromkeys(("latents_0", "latents_1"), kept.name if kept else None),
            "model": storing.model,
        }
        for number, place in enumerate(places)
        for index in range(0, num_images, 2)
    ]
    part = pa.Table.from_pylist(rows, schema=CANDIDATES_SCHEMA)
    # Each prompt's values, once for each of its rows.
    carried = further.slice(unit * prompts.per_unit, prompts.per_unit)
    carried = carried.take(np.repeat(places, num_images // 2)) if further.num_columns else carried
    for name in further.column_names:
        part = part.append_column(further.schema.field(name), carried[name])
    path = out / part_name(unit)
    with atomic_path(path) as temporary:
        pq.write_table(
            part, temporary, row_group_size=_ROWS_PER_GROUP, compression="NONE", use_dictionary=["prompt", "model"]
        )
        size, digest = temporary.stat().st_size, sha256_file(temporary)
    return CandidatesPart(name=path.name, rows=len(rows), prompts=len(places), bytes=size, sha256=digest, kept=kept)


def _write_kept(path: AnyPath, row: pa.Table, images: Sequence[bytes], storing: Storing) -> StoredFile:
    """Write latents float32 [C, h, w] by image id, and states [M, C, h, w] with their timesteps [M]."""
    latents = [_floats(each, storing.noise_shape) for each in byte_views(cell_values(row, "latents"))]
    tensors = {image_id(image): value for image, value in zip(images, latents, strict=True)}
    if count := storing.settings.num_states:
        states = [_floats(each, storing.noise_shape) for each in byte_views(cell_values(row, "states"))]
        times = np.asarray(cell_values(row, "timesteps"), np.float32)
        for number, image in enumerate(images):
            mine = slice(number * count, (number + 1) * count)
            tensors |= {f"{image_id(image)}.states": np.stack(states[mine])}
            tensors |= {f"{image_id(image)}.timesteps": times[mine].copy()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
        size, digest = temporary.stat().st_size, sha256_file(temporary)
    return StoredFile(name=path.name, bytes=size, sha256=digest)


def _floats(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return values.view(np.float32).reshape(shape)
