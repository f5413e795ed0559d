"""``rounds.json``: which stages are done, from which inputs, and how long they took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smpo_common.files import read_versioned, sha256_file, write_json
from smpo_pipeline.rounds.stages import Stage
from smpo_schemas.frozen import FrozenModel

ROUNDS_VERSION = 1
ROUNDS_FILE = "rounds.json"


class StageRecord(FrozenModel):
    """A finished stage.

    Attributes:
        stage: its name.
        command: its command line.
        inputs: SHA-256 of the files that identify what it read, by path.
        output: SHA-256 of the file that it wrote last.
        seconds: how long the command took; for an interrupted stage, the last time it ran.
    """

    stage: str
    command: str
    inputs: dict[str, str]
    output: str
    seconds: float


class RoundRecord(FrozenModel):
    """A round.

    Attributes:
        settings: everything that decides its result.
        stages: the finished ones, in order.
    """

    settings: dict[str, Any]
    stages: list[StageRecord]


class RoundsRecord(FrozenModel):
    """The whole of ``rounds.json``; written after each stage.

    Attributes:
        schema_version: of this file.
        rounds: those that have begun.
        stopped: why no further round was begun, or None.
    """

    schema_version: int
    rounds: list[RoundRecord]
    stopped: str | None = None


def read_record(out: Path) -> RoundsRecord:
    """Read the record of a folder; an empty one if there is none.

    Raises:
        UserError: it is malformed or of another version.
    """
    if not (out / ROUNDS_FILE).is_file():
        return RoundsRecord(schema_version=ROUNDS_VERSION, rounds=[])
    return read_versioned(out / ROUNDS_FILE, RoundsRecord, ROUNDS_VERSION, "choose another --out")


def write_record(out: Path, record: RoundsRecord) -> None:
    """Write ``rounds.json``, atomically."""
    write_json(out / ROUNDS_FILE, record.model_dump())


def with_stage(record: RoundsRecord, number: int, done: StageRecord) -> RoundsRecord:
    """Add a finished stage, in place of an earlier record of it."""
    rounds = list(record.rounds)
    others = [stage for stage in rounds[number].stages if stage.stage != done.stage]
    rounds[number] = rounds[number].model_copy(update={"stages": [*others, done]})
    return record.model_copy(update={"rounds": rounds})


def identify(stage: Stage) -> dict[str, str]:
    """Hash the files that identify what a stage reads."""
    return {str(path): sha256_file(path) for path in stage.inputs}


def is_done(record: RoundsRecord, number: int, stage: Stage) -> bool:
    """Whether a stage was finished from the same inputs, and its output is still there."""
    found = next((each for each in record.rounds[number].stages if each.stage == stage.name), None)
    if found is None or not stage.marker.is_file():
        return False
    return found.inputs == identify(stage) and found.output == sha256_file(stage.marker)
