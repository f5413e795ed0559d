"""Turn committed units into the scores table, new or with more columns.

The table consists of the parts that ``scores.json`` lists. Part names contain the number of rewards, so that a table
with more columns is written beside the old one and replaces it at once, when ``scores.json`` is renamed.
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
from smpo_common.files import arrow_source, read_all, reading_parquet
from smpo_common.retry import retry_transient
from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.score.collector import read_unit_rows, unit_path, unit_rejects, with_reasons
from smpo_pipeline.jobs.score.pair_ids import PairIds
from smpo_schemas.label_file import PairVotes, with_labels
from smpo_schemas.pairs.layout import FURTHER
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.rejects import REJECTS_FILE, read_rejects, write_rejects
from smpo_schemas.scoring.scores import (
    IMAGE_IDS,
    SCORES_VERSION,
    ScoresInfo,
    ScoresPart,
    read_scores,
    remove_leftovers,
    reward_scores,
    reward_statistics,
    score_columns,
    score_schema,
    table_labels,
    write_part,
    write_scores_info,
)

_UNITS_PER_PART = 512


@dataclass(frozen=True)
class RewardRecord:
    """A reward's model as the table records it: id, fingerprint of its weights, unit of its scores, dtype."""

    model: str
    fingerprint: str
    unit: str
    dtype: str


@retry_transient
def write_table(
    out: AnyPath,
    scoring: Run,
    units: int,
    rewards: Mapping[str, RewardRecord],
    base: ScoresInfo | None,
    further: Sequence[str] = (),
    labels: Mapping[str, PairVotes] | None = None,
) -> ScoresInfo:
    """Write the parts, the rejects, and ``scores.json`` last; then remove old parts.

    Args:
        out: output directory.
        scoring: the run that committed the units.
        units: their number.
        rewards: the rewards that they were scored with.
        base: an existing table to add columns to, or None.
        further: names of further columns of the pairs.
        labels: of :func:`smpo_schemas.label_file.read_labels`, in place of the pairs' own.

    Raises:
        UserError: no pair could be scored, the pairs are not those of ``base``, or none of them is in ``labels``.
    """
    names = [*(base.rewards if base else ()), *rewards]
    parts, rejects, unseen = [], [], set(labels or ())
    old_table, ids = _OldTable(out, base, names) if base else None, PairIds()
    for number, start in enumerate(range(0, units, _UNITS_PER_PART)):
        group = range(start, min(units, start + _UNITS_PER_PART))
        rows = pa.concat_tables(read_all(lambda unit: read_unit_rows(unit_path(scoring, unit)), group))
        unseen.difference_update(rows["pair_id"].to_pylist())
        rows = with_labels(rows, labels or {})
        if old_table:
            rows = old_table.join(rows)
        rows = _reject_repeated_ids(rows, ids)
        rejects += unit_rejects(rows)
        scored = rows.filter(pc.is_null(rows["reason"]))
        if scored.num_rows:
            path = out / f"scores-{len(names)}-{number:06d}.parquet"
            parts.append(write_part(path, scored, names, further, old_table.added if old_table else ()))
    # Added rewards may reject more rows; otherwise the existing file is still right.
    if not base or (parts and len(rejects) > base.rejected):
        write_rejects(out / REJECTS_FILE, rejects)
    if not parts:
        first = f"; the first: {rejects[0].source}: {rejects[0].reason}"
        raise UserError(f"no pair could be scored, {len(rejects)} were rejected (see {out / REJECTS_FILE}){first}")
    if labels is not None and len(unseen) == len(labels):
        raise UserError(f"--labels: none of its {len(labels)} pairs is in --pairs")
    before = (
        {name: RewardRecord(s.model, s.fingerprint, s.unit, s.dtype) for name, s in base.rewards.items()}
        if base
        else {}
    )
    info = _describe(out, parts, {**before, **rewards}, len(rejects))
    write_scores_info(out, info)
    remove_leftovers(out, info)
    return info


def _reject_repeated_ids(rows: pa.Table, ids: PairIds) -> pa.Table:
    """Reject the rows whose pair_id an earlier row has for another pair."""
    reasons = np.array(rows["reason"].to_pylist(), dtype=object)
    scored = np.flatnonzero(pc.is_null(rows["reason"]).to_numpy())
    reasons[scored[ids.repeated(rows.take(scored))]] = (
        f"{RejectKind.REPEATED_ID}: an earlier row has it for another prompt or other images"
    )
    return with_reasons(rows, reasons.tolist())


def _describe(
    out: AnyPath, parts: Sequence[ScoresPart], rewards: Mapping[str, RewardRecord], rejected: int
) -> ScoresInfo:
    info = ScoresInfo(
        schema_version=SCORES_VERSION,
        rewards={},
        parts=list(parts),
        scored=sum(part.pairs for part in parts),
        rejected=rejected,
    )
    table = read_scores(out, info, ["label", *score_columns(rewards)])
    labels = table_labels(table)
    statistics = {
        name: reward_statistics(reward_scores(table, name), labels, **dataclasses.asdict(model))
        for name, model in rewards.items()
    }
    return info.model_copy(update={"rewards": statistics})


class _OldTable:
    """An existing table, read part by part beside the same input rows with scores of more rewards."""

    def __init__(self, out: AnyPath, base: ScoresInfo, rewards: Sequence[str]) -> None:
        self._out, self._base = out, base
        self._rejects = {reject.source: reject.reason for reject in read_rejects(out / REJECTS_FILE)}
        self._parts, self._next = base.parts, 0
        own = score_schema(rewards, list(FURTHER)).names
        with reading_parquet(out / base.parts[0].name):
            first = pq.read_schema(arrow_source(out / base.parts[0].name))
        # The new parts replace these files: what others added, such as the weights of `weigh`, must not go with them.
        self.added = [field for field in first if field.name not in own]

    def join(self, rows: pa.Table) -> pa.Table:
        """Add the existing columns to ``rows``, which are all rows of one part.

        Raises:
            UserError: they are not the pairs that the part holds.
        """
        part = self._parts[self._next] if self._next < len(self._parts) else None
        old = read_scores(self._out, self._base.model_copy(update={"parts": [part] if part else []}))
        scored, reasons = self._match(rows, _keys(old))
        if scored:
            self._next += 1
        for name in score_columns(self._base.rewards):
            column = np.full(rows.num_rows, np.nan, dtype=np.float32)
            column[scored] = old[name].to_numpy() if scored else ()
            rows = rows.append_column(name, pa.array(column))
        at = np.full(rows.num_rows, -1)
        at[scored] = range(len(scored))
        for field in self.added:
            column = old[field.name].take(pa.array(at, mask=at < 0)) if scored else pa.nulls(len(at), field.type)
            rows = rows.append_column(field, column)
        return with_reasons(rows, reasons)

    def _match(self, rows: pa.Table, old: Sequence[tuple[object, ...]]) -> tuple[list[int], list[str | None]]:
        """Find the positions of the old rows in ``rows``, and each row's reason for not being in the new table.

        An old row was scored, whatever ``rejected.parquet`` says: a kill may have left a file that already contains
        the added reward's rejects.
        """
        scored: list[int] = []
        reasons: list[str | None] = []
        sources, new_reasons = (rows[name].to_pylist() for name in ("source", "reason"))
        for position, (key, source, reason) in enumerate(zip(_keys(rows), sources, new_reasons, strict=True)):
            if len(scored) < len(old) and old[len(scored)] == key:
                scored.append(position)
                reasons.append(reason)
            elif source in self._rejects:
                # Rejected before: keep the old reason.
                reasons.append(self._rejects[source])
            else:
                self._refuse(source)
        if scored and len(scored) < len(old):
            self._refuse(sources[scored[-1]])
        return scored, reasons

    def _refuse(self, source: str) -> NoReturn:
        raise UserError(
            f"--pairs: rows from {source} on are not the pairs that {self._out} holds scores of: a file was changed in "
            "place; use another --out, or --overwrite to start over"
        )


def _keys(table: pa.Table) -> list[tuple[object, ...]]:
    """Return a key for each row; rows with the same key have the same scores."""
    columns = ("pair_id", "prompt", "label", "annotator", *IMAGE_IDS)
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))
