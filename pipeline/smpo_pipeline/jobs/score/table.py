"""From committed units to the scores table, new or with more columns.

A table is what its ``scores.json`` lists. Parts of another number of rewards have other names, so that a table with
more columns is written beside the old one and takes its place at once, when ``scores.json`` is renamed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import arrow_source, read_all
from smpo_common.retry import retry_transient
from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.score.pair_ids import PairIds
from smpo_pipeline.jobs.score.units import rejects_of, unit_path
from smpo_schemas.rejects import read_rejects, write_rejects
from smpo_schemas.scores import (
    IMAGE_IDS,
    REJECTS_FILE,
    SCORES_VERSION,
    ScoresInfo,
    ScoresPart,
    read_scores,
    reward_scores,
    reward_statistics,
    table_labels,
    write_part,
    write_scores_info,
)

_UNITS_PER_PART = 512

PART_FILES = "scores-*.parquet"


@dataclass(frozen=True)
class RewardModel:
    """What the table says of a reward's model: id, fingerprint of its weights, unit of its scores, its arithmetic."""

    model: str
    fingerprint: str
    unit: str
    dtype: str


@retry_transient
def write_table(
    out: AnyPath, step: Run, units: int, rewards: Mapping[str, RewardModel], base: ScoresInfo | None
) -> ScoresInfo:
    """Write the table, its rejects, and ``scores.json`` last; then remove what no longer belongs to it.

    Args:
        out: output directory.
        step: where ``units`` units are committed.
        units: how many.
        rewards: what they were scored with.
        base: the table that is there already, which gets more columns.

    Raises:
        UserError: no pair is left, or the pairs are not those of the table that is there.
    """
    names = [*(base.rewards if base else ()), *rewards]
    parts, rejects = [], []
    tables, ids = _PartsBefore(out, base) if base else None, PairIds()
    for number, start in enumerate(range(0, units, _UNITS_PER_PART)):
        group = range(start, min(units, start + _UNITS_PER_PART))
        rows = pa.concat_tables(read_all(lambda unit: pq.read_table(arrow_source(unit_path(step, unit))), group))
        if tables:
            rows = tables.join(rows)
        rows = _one_pair_an_id(rows, ids)
        rejects += rejects_of(rows)
        kept = rows.filter(pc.is_null(rows["reason"]))
        if kept.num_rows:
            parts.append(write_part(out / f"scores-{len(names)}-{number:06d}.parquet", kept, names))
    if not base or (parts and len(rejects) > base.rejected):
        write_rejects(out / REJECTS_FILE, rejects)
    if not parts:
        first = f"; the first: {rejects[0].source}: {rejects[0].reason}"
        raise UserError(f"no pair could be scored, {len(rejects)} were rejected (see {out / REJECTS_FILE}){first}")
    before = (
        {name: RewardModel(s.model, s.fingerprint, s.unit, s.dtype) for name, s in base.rewards.items()} if base else {}
    )
    info = _describe(out, parts, {**before, **rewards}, len(rejects))
    write_scores_info(out, info)
    remove_leftovers(out, info)
    return info


def remove_leftovers(out: AnyPath, info: ScoresInfo) -> None:
    """Remove parts that are not, or no longer, of the table."""
    named = {part.name for part in info.parts}
    for path in out.glob(PART_FILES):
        if path.name not in named:
            path.unlink()


def _one_pair_an_id(rows: pa.Table, ids: PairIds) -> pa.Table:
    """``rows``, where those are rejected whose id an earlier row has for another pair."""
    reasons = np.array(rows["reason"].to_pylist(), dtype=object)
    kept = np.flatnonzero(pc.is_null(rows["reason"]).to_numpy())
    reasons[kept[ids.taken(rows.take(kept))]] = (
        "repeated pair_id: an earlier row has it for another prompt or other images"
    )
    return _with_reasons(rows, reasons.tolist())


def _with_reasons(rows: pa.Table, reasons: list[str | None]) -> pa.Table:
    return rows.set_column(rows.column_names.index("reason"), "reason", pa.array(reasons, pa.string()))


def _describe(
    out: AnyPath, parts: Sequence[ScoresPart], rewards: Mapping[str, RewardModel], rejected: int
) -> ScoresInfo:
    info = ScoresInfo(
        schema_version=SCORES_VERSION,
        rewards={},
        parts=list(parts),
        scored=sum(part.pairs for part in parts),
        rejected=rejected,
    )
    table = read_scores(out, info, ["label", *(f"{name}_{index}" for name in rewards for index in range(2))])
    labels = table_labels(table)
    statistics = {
        name: reward_statistics(reward_scores(table, name), labels, **dataclasses.asdict(each))
        for name, each in rewards.items()
    }
    return info.model_copy(update={"rewards": statistics})


class _PartsBefore:
    """The table that is there, part by part beside the same input rows scored again with other rewards."""

    def __init__(self, out: AnyPath, base: ScoresInfo) -> None:
        self._out, self._base = out, base
        self._rejects = {reject.source: reject.reason for reject in read_rejects(out / REJECTS_FILE)}
        self._parts, self._next = base.parts, 0

    def join(self, rows: pa.Table) -> pa.Table:
        """``rows``, all of one part, with the columns that are there already.

        Raises:
            UserError: they are not the pairs that the part holds.
        """
        part = self._parts[self._next] if self._next < len(self._parts) else None
        old = read_scores(self._out, self._base.model_copy(update={"parts": [part] if part else []}))
        scored, reasons = self._match(rows, _keys(old))
        if scored:
            self._next += 1
        for name in (f"{reward}_{index}" for reward in self._base.rewards for index in range(2)):
            column = np.full(rows.num_rows, np.nan, dtype=np.float32)
            column[scored] = old[name].to_numpy() if scored else ()
            rows = rows.append_column(name, pa.array(column))
        return _with_reasons(rows, reasons)

    def _match(self, rows: pa.Table, old: Sequence[tuple[object, ...]]) -> tuple[list[int], list[str | None]]:
        """Where in ``rows`` the old ones are, in order, and why each row is not in the new table.

        Whoever is among the old ones was scored, whatever ``rejected.parquet`` says: a kill may have left one that
        already has the rows that the added reward rejects.
        """
        scored: list[int] = []
        reasons: list[str | None] = []
        sources, news = (rows[name].to_pylist() for name in ("source", "reason"))
        for position, (key, source, new) in enumerate(zip(_keys(rows), sources, news, strict=True)):
            if len(scored) < len(old) and old[len(scored)] == key:
                scored.append(position)
                reasons.append(new)
            elif source in self._rejects:
                # What was rejected before stays so, for the reason that was given.
                reasons.append(self._rejects[source])
            else:
                self._refuse(source)
        if scored and len(scored) < len(old):
            self._refuse(sources[scored[-1]])
        return scored, reasons

    def _refuse(self, source: str) -> NoReturn:
        raise UserError(
            f"--pairs: rows from {source} on are not those that {self._out} holds scores of: a file was changed in "
            "place; take another --out, or --overwrite to start over"
        )


def _keys(table: pa.Table) -> list[tuple[object, ...]]:
    """What tells one row from another, but for those that have the same scores."""
    columns = ("pair_id", "prompt", "label", "annotator", *IMAGE_IDS)
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))
