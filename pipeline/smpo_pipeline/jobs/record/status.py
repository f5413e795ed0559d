"""Progress of a run of a job, read from its committed units; without Ray, from any machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.record.lock import holder
from smpo_pipeline.jobs.record.run_record import (
    SCORE_ROWS,
    SCORING_FOLDER,
    UnitRecord,
    last_start,
    read_identity,
    read_records,
)
from smpo_schemas.generation.candidates import CANDIDATES_FILE, read_candidates
from smpo_schemas.manifest import MANIFEST_FILE, TEXT_FOLDER, read_manifest
from smpo_schemas.rejects import REJECTS_FILE, count_reasons, read_rejects
from smpo_schemas.scoring.scores import SCORES_FILE, read_scores_info


@dataclass(frozen=True)
class Status:
    """Progress of a run.

    Attributes:
        job: ``score``, ``invert``, ``generate`` or ``steps``.
        rewards: the rewards being scored, or scored (``score`` only).
        finished: whether the output is complete.
        units, units_done: number of units, and of committed ones.
        pairs_in, pairs_done, rejected: rows of the input (prompts for ``generate``), those in committed units, and the
            rejected ones of these.
        reasons: number of rejects by kind of reason, most frequent first.
        rate: rows per second since the run was last started or continued; None if no unit was committed since.
        model_share: the model's share of the actors' time in those units, 0 to 1 (not ``score``), or None.
        holder: the process that runs it, or None; on an object store a killed process is named too.
        last_commit: time of the last commit, in seconds since 1970; None if there is none, or the run is finished.
        prompts: stored prompts and all prompts (``--text stored`` of ``invert`` and ``steps``); None where none are
            stored.
    """

    job: str
    rewards: list[str]
    finished: bool
    units: int
    units_done: int
    pairs_in: int
    pairs_done: int
    rejected: int
    reasons: dict[str, int]
    rate: float | None = None
    model_share: float | None = None
    holder: str | None = None
    last_commit: float | None = None
    prompts: tuple[int, int] | None = None

    @property
    def remaining(self) -> float | None:
        """Estimated seconds left, at this rate."""
        return (self.pairs_in - self.pairs_done) / self.rate if self.rate else None


def read_status(out: AnyPath) -> Status:
    """Read the status of an output directory; nothing is changed.

    Raises:
        UserError: it is not an output of ``score``, ``invert``, ``generate`` or ``steps``, or is malformed.
    """
    try:
        return _read_status(out)
    except (FileNotFoundError, UserError):
        # A run that ends or starts over removes files while they are read: read once more.
        return _read_status(out)


def _read_status(out: AnyPath) -> Status:
    identity = read_identity(out)
    if identity is None:
        raise UserError(f"{out} holds no run.json: none of `score`, `invert`, `generate` and `steps` was started there")
    if identity["job"] == "select":
        raise UserError(f"{out} holds the output of `select`, which has no status; see `smpo-pipeline inspect {out}`")
    pairs_in = _rows(identity)
    if identity["job"] == "generate":
        return _generate_status(identity, out, pairs_in)
    if identity["job"] in ("invert", "steps"):
        of_prompts = identity["job"] == "steps"
        units = math.ceil(pairs_in / identity["prompts_per_shard" if of_prompts else "pairs_per_shard"])
        pairs_in *= identity["pairs_per_prompt"] if of_prompts else 1
        if (out / MANIFEST_FILE).is_file():
            manifest = read_manifest(out)
            reasons = manifest.rejected_reasons
            finished = _finished(identity["job"], [], units, pairs_in, manifest.totals.rejected, reasons)
            return replace(finished, prompts=(manifest.text.prompts,) * 2) if manifest.text else finished
        unfinished = _unfinished(identity, [], out, units, pairs_in, holder(out))
        return replace(unfinished, prompts=_prompts(out / TEXT_FOLDER))
    units = math.ceil(pairs_in / SCORE_ROWS)
    step = read_identity(out / SCORING_FOLDER)
    info = read_scores_info(out) if (out / SCORES_FILE).is_file() else None
    if step is not None and not (info and step["rewards"].keys() <= info.rewards.keys()):
        return _unfinished(step, sorted(step["rewards"]), out / SCORING_FOLDER, units, pairs_in, holder(out))
    if info is None:
        return _unfinished(identity, [], out, units, pairs_in, holder(out))
    reasons = count_reasons(read_rejects(out / REJECTS_FILE))
    return _finished("score", sorted(info.rewards), units, pairs_in, info.rejected, reasons)


def _generate_status(identity: dict[str, Any], out: AnyPath, prompts: int) -> Status:
    units = math.ceil(prompts / identity["prompts_per_file"])
    if not (out / CANDIDATES_FILE).is_file():
        return _unfinished(identity, [], out, units, prompts, holder(out))
    made = read_candidates(out)
    return _finished("generate", [], units, prompts, made.rejected, made.rejected_reasons)


def _prompts(folder: AnyPath) -> tuple[int, int] | None:
    """Return the numbers of stored prompts and of all prompts of an unfinished run; None where none are stored yet."""
    identity = read_identity(folder)
    if identity is None:
        return None
    return sum(record.pairs for record in read_records(folder, identity)), identity["prompts"]


def _rows(identity: dict[str, Any]) -> int:
    rows = sum(file[1] for file in identity["input"]["files"])
    limit = identity["input"]["limit"]
    return rows if limit is None else min(rows, limit)


def _finished(
    job: str, rewards: list[str], units: int, pairs_in: int, rejected: int, reasons: dict[str, int]
) -> Status:
    return Status(job, rewards, True, units, units, pairs_in, pairs_in, rejected, reasons)


def _unfinished(
    identity: dict[str, Any], rewards: list[str], out: AnyPath, units: int, pairs_in: int, holder: str | None
) -> Status:
    records = read_records(out, identity)
    start = last_start(out)
    recent = [record for record in records if record.committed and record.committed > start]
    rejects = [reject for record in records for reject in record.rejects]
    return Status(
        job=identity["job"],
        rewards=rewards,
        finished=False,
        units=units,
        units_done=len(records),
        pairs_in=pairs_in,
        pairs_done=sum(record.pairs_in for record in records),
        rejected=len(rejects),
        reasons=count_reasons(rejects),
        rate=_rate(recent, start),
        model_share=_model_share(recent),
        holder=holder,
        last_commit=max((record.committed for record in records if record.committed), default=None),
    )


def _rate(records: Sequence[UnitRecord], start: float) -> float | None:
    last = max((record.committed for record in records if record.committed), default=None)
    return None if last is None else sum(record.pairs_in for record in records) / (last - start)


def _model_share(records: Sequence[UnitRecord]) -> float | None:
    seconds = [record.seconds for record in records if record.seconds]
    return sum(model for model, _ in seconds) / sum(whole for _, whole in seconds) if seconds else None
