"""The record of a run: what it is of, which units of work are committed, whether it is finished.

A unit is a deterministic slice of the input. Its output is written beside its target, fsynced and renamed; only then
is it recorded. The same command continues an unfinished run with the units that have no record, or whose record does
not tell the truth any more.

Workers may outlive their run, and commit a unit after another run was begun in the same directory. Records, and what
lies beside them, therefore carry a digest of the run's identity in their names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from smpo_common.errors import UserError
from smpo_common.files import (
    Statuses,
    list_files,
    read_all,
    read_json,
    remove_tree,
    sha256_file,
    sha256_json,
    statuses,
    write_json,
)
from smpo_common.retry import retry_transient
from smpo_common.same_settings import require_same_settings
from smpo_common.store_path import AnyPath
from smpo_schemas.manifest import Bucket
from smpo_schemas.pairs import PairFile
from smpo_schemas.rejects import Reject

_IDENTITY = "run.json"
_UNITS = ".units"

SCORE_STEP = ".scoring"
"""Folder of what is not yet in the scores table: units scored with the rewards that are being added."""

SCORE_ROWS = 128
"""Input rows of a unit of ``score``: what a kill can cost, at most, for each chunk that was on its way."""


class UnitRecord(BaseModel):
    """What one unit left behind.

    Attributes:
        unit: its number.
        pairs_in: rows of the input that it stands for; ``pairs_in = pairs + len(rejects)``.
        pairs: how many of them are in its output.
        rejects: the others, with reasons.
        entry: its file's ``name`` within the run's directory, ``bytes`` and ``sha256``, and what else the finished
            directory says of it; None where nothing was left to write.
        health: sums of trajectory health (``invert`` only).
        prompts_cut: pairs in its output whose prompt is longer than the text encoders take (``invert`` only).
        committed: when, in seconds since 1970 by the clock of whoever committed it; in no result.
        buckets: pairs in its output by image size (``invert --buckets`` only).
        seconds: of its actor since it was ready for this unit, waiting included: in the inversion, and all of them
            (``invert`` only); in no result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: int
    pairs_in: int
    pairs: int
    rejects: list[Reject]
    entry: dict[str, Any] | None
    health: list[list[float]] | None = None
    prompts_cut: int = 0
    committed: float | None = None
    buckets: list[Bucket] = []
    seconds: tuple[float, float] | None = None


class Run:
    """One output directory of ``score`` or ``invert``."""

    def __init__(self, out: AnyPath, marker: str, identity: Mapping[str, Any]) -> None:
        """Name a run.

        Args:
            out: output directory.
            marker: the file whose presence says that the run is finished.
            identity: everything that decides the result; plain JSON values.
        """
        self.out, self._marker, self._identity = out, out / marker, dict(identity)
        self._digest = _digest(self._identity)

    @retry_transient
    def open(self, *, overwrite: bool, patterns: Sequence[str]) -> bool:
        """Begin, continue, or find finished; returns whether there is work to do.

        Args:
            overwrite: remove what an earlier run left here.
            patterns: names of the files that this kind of run writes, for removal.

        Raises:
            UserError: an earlier run into this directory had another identity, or was another job's, which no flag
                removes; or it cannot be written.
        """
        path = self.out / _IDENTITY
        if path.is_file():
            self._refuse_another_job(path)
        if overwrite:
            self._remove(patterns)
        if path.is_file():
            state = "a finished run" if self._marker.is_file() else "an unfinished run"
            require_same_settings(self.out, state, read_json(path), self._identity)
        elif self._marker.is_file():
            raise UserError(f"{self.out} holds {self._marker.name} but no {_IDENTITY}; take another --out")
        if self._marker.is_file():
            # A kill may have come between the marker and the end.
            self.finish()
            return False
        write_json(path, self._identity)
        self._remove_temporaries()
        return True

    def _refuse_another_job(self, path: AnyPath) -> None:
        try:
            there = read_json(path)
        except UserError as error:
            if isinstance(error.__cause__, (ValueError, RecursionError)):
                return  # damaged: nobody's
            raise
        job = there.get("job") if isinstance(there, dict) else None
        if job and job != self._identity.get("job"):
            raise UserError(f"{self.out} holds the output of `{job}`; take another --out")

    def _remove(self, patterns: Sequence[str]) -> None:
        # The marker and the records go first: a directory that is half removed must not look finished, nor its missing
        # files committed.
        self._marker.unlink(missing_ok=True)
        self._remove_records()
        for path in [*(p for pattern in patterns for p in self.out.glob(pattern)), self.out / _IDENTITY]:
            path.unlink(missing_ok=True)

    def began_with(self) -> dict[str, Any] | None:
        """The identity of the run that is there, or None."""
        return read_identity(self.out)

    @retry_transient
    def remove(self) -> None:
        """Remove what is there, the folder included; a part of it that is left by a kill is never taken for a run's."""
        self._remove(())
        with suppress(OSError):
            self.out.rmdir()

    def record_path(self, unit: int) -> AnyPath:
        """Where a unit's record is written by whoever committed its output."""
        return self.out / _UNITS / f"{unit:06d}-{self._digest}.json"

    def commit(self, record: UnitRecord) -> None:
        """Record a unit whose output is written."""
        write_json(self.record_path(record.unit), record.model_copy(update={"committed": time.time()}).model_dump())

    def refuse_if_over(self) -> None:
        """Before output takes its place: look whether the directory is still this run's, which a worker may outlive.

        Raises:
            UserError: another run was begun there.
        """
        there = self.began_with()
        if there is None or _digest(there) != self._digest:
            raise UserError(f"another run was begun in {self.out}: this one is over")

    @retry_transient
    def records(self) -> dict[int, UnitRecord]:
        """The committed units' records, by number.

        A record that is damaged, or whose file is missing, cut or another one, is removed: its unit is made again.
        """
        beside = statuses(self.out / _UNITS, "*")
        checked = partial(self._checked, files=beside | statuses(self.out, "*"))
        mine = [path for path in beside if path.name.endswith(f"-{self._digest}.json")]
        return {record.unit: record for record in read_all(checked, sorted(mine, key=str)) if record}

    def _checked(self, path: AnyPath, files: Statuses) -> UnitRecord | None:
        record = _read_record(path)
        if record and self._has_output(record, path, files):
            return record
        path.unlink()
        return None

    def committed(self, unit: int) -> UnitRecord | None:
        """The record of a unit that was committed since this run began, or that :meth:`records` found good.

        For workers: Ray may ask again for a unit whose worker was lost after it had committed it.
        """
        try:
            return _read_record(self.record_path(unit))
        except FileNotFoundError:
            return None

    def _has_output(self, record: UnitRecord, path: AnyPath, files: Statuses) -> bool:
        """Whether a unit's file is the one that was recorded.

        Reading all of it back would cost as much as a part of the run: its bytes are hashed only where it was written
        after its record, which no unit does.
        """
        if record.entry is None:
            return True
        file = self.out / record.entry["name"]
        written = files.get(file)
        if written is None or written.st_size != record.entry["bytes"]:
            return False
        return written.st_mtime_ns <= files[path].st_mtime_ns or sha256_file(file) == record.entry["sha256"]

    @retry_transient
    def finish(self) -> None:
        """Remove what is of no use once the marker, which holds all that the records say, is written."""
        self._remove_temporaries()
        self._remove_records()

    def _remove_temporaries(self) -> None:
        """Remove what killed processes were writing; nobody else writes here, see ``lock``."""
        for directory in (self.out, self.out / _UNITS):
            for path in directory.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def _remove_records(self) -> None:
        remove_tree(self.out / _UNITS)


def read_identity(out: AnyPath) -> dict[str, Any] | None:
    """What the run in ``out`` is of, or None where there is none."""
    path = out / _IDENTITY
    return dict(read_json(path)) if path.is_file() else None


def begun_at(out: AnyPath) -> float:
    """When the run in ``out`` was begun, or continued for the last time, in seconds since 1970."""
    return (out / _IDENTITY).stat().st_mtime


def read_records(out: AnyPath, identity: Mapping[str, Any]) -> list[UnitRecord]:
    """The records of the units that the run in ``out``, of this identity, has committed, as they stand."""
    records = read_all(_read_record, list_files(out / _UNITS, f"*-{_digest(identity)}.json"))
    return [record for record in records if record]


def _digest(identity: Mapping[str, Any]) -> str:
    return sha256_json(identity)[:16]


def _read_record(path: AnyPath) -> UnitRecord | None:
    """A unit's record, or None where it is malformed."""
    try:
        return UnitRecord.model_validate_json(path.read_bytes())
    except ValidationError:
        return None


def describe_input(files: Sequence[PairFile], limit: int | None) -> dict[str, Any]:
    """The input listing as part of a run's identity: paths, sizes, and what the files hold."""
    listing = [[str(file.path), file.rows, file.bytes, file.digest] for file in files]
    return {"files": listing, "limit": limit}
