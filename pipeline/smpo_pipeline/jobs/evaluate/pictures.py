"""Store a unit of an evaluation's images as files. Does not import torch: encoding workers start fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from smpo_common.files import write_bytes
from smpo_pipeline.evaluation.picture_files import PictureFiles
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.generate.parts import Prompts, encoded, unit_rows
from smpo_pipeline.jobs.record.run_record import UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.generation.candidates import GenerationSettings


@dataclass(frozen=True)
class PictureRun:
    """The units of one model's images. They hold prompts that lack images: only the files tell what is done.

    Attributes:
        files: of the images.
        origin: what they are made from.
    """

    files: PictureFiles
    origin: dict[str, str]

    @property
    def out(self) -> Path:
        """The folder of the images."""
        return self.files.folder

    def records(self) -> dict[int, UnitRecord]:
        """Return no record."""
        return {}

    def committed(self, unit: int) -> UnitRecord | None:  # noqa: ARG002
        """Return no record: images of a lost worker are made again, the same."""
        return None

    def forget(self, unit: int) -> None:
        """Do nothing."""


def write_pictures(
    row: pa.Table, prompts: Prompts, settings: GenerationSettings, run: PictureRun, work_log: WorkLog
) -> pa.Table:
    """Encode and write the images of an actor's row; return the unit's record as JSON. Files that exist are kept."""
    unit = row["unit"][0].as_py()
    with CrashGuard(work_log).working(("write", unit), f"encoding the images of unit {unit}"):
        rows = unit_rows(prompts.rows(), unit, prompts.per_unit)
        places, images, rejects = encoded(row, settings)
        run.files.require(run.origin)
        for number, image in enumerate(images):
            place, index = divmod(number, settings.images_per_prompt)
            path = run.files.path(rows[places[place]]["row"], index)
            if not path.is_file():
                write_bytes(path, image)
    record = UnitRecord(
        unit=unit,
        pairs_in=len(rows),
        pairs=len(places),
        rejects=rejects,
        entry=None,
        seconds=tuple(row["seconds"][0].as_py()),
    )
    return pa.table({"record": [record.model_dump_json()]})
