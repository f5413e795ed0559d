"""The record of a run: what it is of, which units of work are committed, whether it is finished.

A unit is a deterministic slice of the input. Its output is written beside its target, fsynced and renamed; only then
is it recorded. The same command continues an unfinished run with the units that have no record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from smpo_schemas.errors import UserError
from smpo_schemas.files import read_json, write_json
from smpo_schemas.manifest import Bucket
from smpo_schemas.pairs import PairFile
from smpo_schemas.rejects import Reject

_IDENTITY = "run.json"
_UNITS = ".units"


class UnitRecord(BaseModel):
    """What one unit left behind.

    Attributes:
        unit: its number.
        pairs_in: rows of the input that it stands for; ``pairs_in = pairs + len(rejects)``.
        pairs: how many of them are in its output.
        rejects: the others, with reasons.
        entry: what the finished directory says of its file, or None where nothing was left to write.
        health: sums of walk health (``invert`` only).
        prompts_cut: pairs in its output whose prompt is longer than the text encoders take (``invert`` only).
        buckets: pairs in its output by image size (``invert --buckets`` only).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: int
    pairs_in: int
    pairs: int
    rejects: list[Reject]
    entry: dict[str, Any] | None
    health: list[list[float]] | None = None
    prompts_cut: int = 0
    buckets: list[Bucket] = []


class Run:
    """One output directory of ``score`` or ``invert``."""

    def __init__(self, out: Path, marker: str, identity: Mapping[str, Any]) -> None:
        """Name a run.

        Args:
            out: output directory.
            marker: the file whose presence says that the run is finished.
            identity: everything that decides the result; plain JSON values.
        """
        self.out, self._marker, self._identity = out, out / marker, dict(identity)

    def open(self, *, overwrite: bool, patterns: Sequence[str]) -> bool:
        """Begin, continue, or find finished; returns whether there is work to do.

        Args:
            overwrite: remove what an earlier run left here.
            patterns: names of the files that this kind of run writes, for removal.

        Raises:
            UserError: an earlier run into this directory had another identity, or it cannot be written.
        """
        if overwrite:
            self._remove(patterns)
        path = self.out / _IDENTITY
        if path.is_file():
            changed = _difference(read_json(path), self._identity)
            if changed:
                state = "a finished" if self._marker.is_file() else "an unfinished"
                raise UserError(
                    f"{self.out} holds {state} run with other settings ({changed}); "
                    "take another --out, or --overwrite to begin anew"
                )
        elif self._marker.is_file():
            raise UserError(f"{self.out} holds {self._marker.name} but no {_IDENTITY}; take another --out")
        write_json(path, self._identity)
        return not self._marker.is_file()

    def _remove(self, patterns: Sequence[str]) -> None:
        # The marker and the records go first: a directory that is half removed must not look finished, nor its missing
        # files committed.
        self._marker.unlink(missing_ok=True)
        self._remove_records()
        for path in [*(p for pattern in patterns for p in self.out.glob(pattern)), self.out / _IDENTITY]:
            path.unlink(missing_ok=True)

    def began_with(self) -> dict[str, Any] | None:
        """The identity of the run that is there, or None."""
        path = self.out / _IDENTITY
        return dict(read_json(path)) if path.is_file() else None

    def remove(self) -> None:
        """Remove what is there, the folder included; a part of it that is left by a kill is never taken for a run's."""
        self._remove(())
        with suppress(OSError):
            self.out.rmdir()

    def record_path(self, unit: int) -> Path:
        """Where a unit's record is written by whoever committed its output."""
        return self.out / _UNITS / f"{unit:06d}.json"

    def records(self) -> dict[int, UnitRecord]:
        """The committed units' records, by number."""
        found = {}
        for path in sorted((self.out / _UNITS).glob("*.json")):
            try:
                record = UnitRecord.model_validate(read_json(path))
            except ValidationError as error:
                raise UserError(f"{path} is malformed; remove it and its unit is made again") from error
            found[record.unit] = record
        return found

    def finish(self) -> None:
        """Remove the units' records once the marker, which holds all they say, is written."""
        self._remove_records()

    def _remove_records(self) -> None:
        directory = self.out / _UNITS
        if directory.is_dir():
            for path in directory.iterdir():
                path.unlink()
            directory.rmdir()


def write_record(path: Path, record: UnitRecord) -> None:
    """Commit a unit."""
    write_json(path, record.model_dump())


def describe_input(files: Sequence[PairFile], limit: int | None) -> dict[str, Any]:
    """The input listing as part of a run's identity: paths, sizes, and what the files hold."""
    listing = [[str(file.path), file.rows, file.path.stat().st_size, file.digest] for file in files]
    return {"files": listing, "limit": limit}


def _difference(old: Any, new: Mapping[str, Any], prefix: str = "") -> str:  # noqa: ANN401  (any JSON value)
    """The settings that differ, in words; empty where none does."""
    if not isinstance(old, dict):
        return f"{prefix or 'run.json'} is malformed"
    parts = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, Mapping):
            parts.append(_difference(before, after, f"{prefix}{key}."))
        elif before != after:
            shown = "" if len(f"{before}{after}") > 100 else f": {before} there, {after} here"  # noqa: PLR2004
            parts.append(f"{prefix}{key}{shown}")
    return "; ".join(part for part in parts if part)
