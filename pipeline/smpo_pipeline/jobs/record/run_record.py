"""The record of a run: its identity, its committed units, whether it is finished.

A unit is a deterministic slice of the input. Its output is written to a temporary file, fsynced and renamed; only then
is it recorded. The same command continues an unfinished run with the units that have no record, or whose record does
not match its file.

Workers may outlive their run and commit a unit after another run was started in the same directory. The names of
records, and of the files beside them, therefore contain a digest of the run's identity.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
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
from smpo_schemas.pairs import PairFile, ReadingChoices
from smpo_schemas.rejects import Reject

_IDENTITY = "run.json"
_UNITS = ".units"

SCORING_FOLDER = ".scoring"
"""Folder of the units of `score` until their rewards are in the scores table."""

SCORE_ROWS = 128
"""Input rows per unit of ``score``: the most work that a kill can cost for each unit in progress."""


class UnitRecord(BaseModel):
    """The result of one committed unit.

    Attributes:
        unit: its number.
        pairs_in: its input rows, prompts for ``generate``; ``pairs_in = pairs + len(rejects)``.
        pairs: number of them in its output.
        rejects: the other rows, with reasons.
        entry: its file: ``name`` within the run's directory, ``bytes``, ``sha256``, and what the manifest lists
            besides, such as a second file as ``kept`` (``generate --keep``); None if no pair was left to write.
        health: sums of trajectory health (``invert`` only).
        prompts_cut: pairs in its output whose prompt is longer than the text encoders take (``invert`` and ``steps``).
        committed: time of the commit in seconds since 1970, by the committing machine's clock; not in any result.
        buckets: pairs in its output by image size (``invert --buckets`` only).
        seconds: the actor's seconds for this unit (``generate``, ``invert`` and ``steps``; not in any result): in the
            model, and in all since it was ready for the unit, waiting included.
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


def unit_records(table: pa.Table) -> list[UnitRecord]:
    """Parse the records that actors return, in the column ``record``."""
    return [UnitRecord.model_validate_json(record) for record in table["record"].to_pylist()]


class Units(Protocol):
    """The units of a run: where they are, and which ones are committed."""

    @property
    def out(self) -> AnyPath:
        """The output directory."""

    def records(self) -> dict[int, UnitRecord]:
        """Read the committed units' records, by number."""

    def committed(self, unit: int) -> UnitRecord | None:
        """Return a unit's record if it is committed."""

    def forget(self, unit: int) -> None:
        """Remove a unit's record: it is made again."""


class Run:
    """A run of a job, such as ``score`` or ``invert``, in its output directory."""

    def __init__(self, out: AnyPath, marker: str, identity: Mapping[str, Any]) -> None:
        """Describe a run; nothing is read or written.

        Args:
            out: output directory.
            marker: the file that is written last, which marks the run as finished.
            identity: everything that decides the result, as JSON values.
        """
        self.out, self._marker, self._identity = out, out / marker, dict(identity)
        self._digest = _digest(self._identity)

    @retry_transient
    def open(self, *, overwrite: bool, patterns: Sequence[str]) -> bool:
        """Start or continue the run; return whether there is work to do.

        Args:
            overwrite: remove the output of an earlier run first.
            patterns: names of the files that this kind of run writes, and of folders (ending with /), for removal.

        Raises:
            UserError: the directory holds a run with another identity, or output of another job, which not even
                ``overwrite`` removes; or it cannot be written.
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
            raise UserError(f"{self.out} holds {self._marker.name} but no {_IDENTITY}; use another --out")
        if self._marker.is_file():
            # A kill between writing the marker and finish() leaves records behind.
            self.finish()
            return False
        write_json(path, self._identity)
        self._remove_temporaries()
        return True

    def _refuse_another_job(self, path: AnyPath) -> None:
        try:
            identity = read_json(path)
        except UserError as error:
            if isinstance(error.__cause__, (ValueError, RecursionError)):
                return  # damaged: it belongs to no job
            raise
        job = identity.get("job") if isinstance(identity, dict) else None
        if job and job != self._identity.get("job"):
            raise UserError(f"{self.out} holds the output of `{job}`; use another --out")

    def _remove(self, patterns: Sequence[str]) -> None:
        # The marker and the records go first: a half-removed directory must not look finished, nor its missing files
        # committed.
        self._marker.unlink(missing_ok=True)
        self._remove_records()
        for folder in (pattern for pattern in patterns if pattern.endswith("/")):
            remove_tree(self.out / folder.rstrip("/"))
        for path in [*(p for pattern in patterns for p in self.out.glob(pattern)), self.out / _IDENTITY]:
            path.unlink(missing_ok=True)

    @retry_transient
    def remove(self) -> None:
        """Delete the run and its folder. Safe to interrupt: a half-deleted folder is never taken for a run."""
        self._remove(())
        with suppress(OSError):
            self.out.rmdir()

    def record_path(self, unit: int) -> AnyPath:
        """Return the file of a unit's record."""
        return self.out / _UNITS / f"{unit:06d}-{self._digest}.json"

    def forget(self, unit: int) -> None:
        """Remove a unit's record: it is made again."""
        self.record_path(unit).unlink()

    def commit(self, record: UnitRecord) -> None:
        """Record a unit whose output is written."""
        write_json(self.record_path(record.unit), record.model_copy(update={"committed": time.time()}).model_dump())

    def require_current(self) -> None:
        """Check that the directory is still this run's, before a worker, which may outlive its run, writes to it.

        Raises:
            UserError: another run was started in the directory.
        """
        current = read_identity(self.out)
        if current is None or _digest(current) != self._digest:
            raise UserError(f"stopped: another run was started in {self.out}")

    @retry_transient
    def records(self) -> dict[int, UnitRecord]:
        """Read the committed units' records, by number.

        Remove a record that is damaged, or whose file is missing, cut or changed: its unit is made again.
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
        """Return a unit's record if it is committed.

        For workers: Ray asks again for a unit whose worker was lost after the commit. Records of earlier sessions were
        checked by :meth:`records`.
        """
        try:
            return _read_record(self.record_path(unit))
        except FileNotFoundError:
            return None

    def _has_output(self, record: UnitRecord, path: AnyPath, files: Statuses) -> bool:
        """Whether a unit's files are the recorded ones."""
        entries = [record.entry, (record.entry or {}).get("kept")]
        return all(self._is_written(entry, path, files) for entry in entries if entry)

    def _is_written(self, entry: Mapping[str, Any], record: AnyPath, files: Statuses) -> bool:
        file = self.out / entry["name"]
        written = files.get(file)
        if written is None or written.st_size != entry["bytes"]:
            return False
        # Hashing every file would take long. A unit writes its files before its record, so only a file that is newer
        # has been changed since.
        return written.st_mtime_ns <= files[record].st_mtime_ns or sha256_file(file) == entry["sha256"]

    @retry_transient
    def finish(self) -> None:
        """Remove the records, once the marker is written, which holds all that they say."""
        self._remove_temporaries()
        self._remove_records()

    def _remove_temporaries(self) -> None:
        """Remove the unfinished files of killed processes; the lock excludes running ones."""
        for directory in (self.out, self.out / _UNITS):
            for path in directory.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def _remove_records(self) -> None:
        remove_tree(self.out / _UNITS)


def read_identity(out: AnyPath) -> dict[str, Any] | None:
    """Read the identity of the run in ``out``, or None if there is none."""
    path = out / _IDENTITY
    return dict(read_json(path)) if path.is_file() else None


def last_start(out: AnyPath) -> float:
    """Return when the run in ``out`` was last started or continued, in seconds since 1970."""
    return (out / _IDENTITY).stat().st_mtime


def read_records(out: AnyPath, identity: Mapping[str, Any]) -> list[UnitRecord]:
    """Read the committed units' records of the run in ``out`` with this identity, without checking their files."""
    records = read_all(_read_record, list_files(out / _UNITS, f"*-{_digest(identity)}.json"))
    return [record for record in records if record]


def _digest(identity: Mapping[str, Any]) -> str:
    return sha256_json(identity)[:16]


def _read_record(path: AnyPath) -> UnitRecord | None:
    """Read a unit's record, or None if it is malformed."""
    try:
        return UnitRecord.model_validate_json(path.read_bytes())
    except ValidationError:
        return None


def describe_input(files: Sequence[PairFile], choices: ReadingChoices, limit: int | None) -> dict[str, dict[str, Any]]:
    """Return the input's part of a run's identity: path, rows, bytes and digest of each file, and flags about them."""
    listing = [[str(file.path), file.rows, file.bytes, file.digest] for file in files]
    return {"input": {"files": listing, "limit": limit}, "columns": choices.given()}
