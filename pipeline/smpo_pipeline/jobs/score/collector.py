"""The driver's side of ``score``: put the chunks of units together and commit the units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import arrow_source, atomic_path, list_files, sha256_file
from smpo_common.retry import retry_transient
from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.cells import cell_values
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.score.chunks import ROWS, pair_failures, pair_scores
from smpo_pipeline.jobs.score.pair_ids import RepeatedIds
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.rejects import Reject

STAGE = "score"


class UnitCollector:
    """Collects chunks and commits each unit that is complete.

    Only the driver commits: Ray may run a task twice, but hands its result over once.
    """

    def __init__(self, run: Run, rewards: Sequence[str], max_reject_rate: float) -> None:
        self._run, self._rewards, self._repeated = run, rewards, RepeatedIds(max_reject_rate)
        self._chunks: dict[int, dict[int, pa.Table]] = defaultdict(dict)
        self._counts: dict[int, int] = {}

    def __call__(self, table: pa.Table) -> Iterator[UnitRecord]:
        """Take some chunks, in any order; yield the records of the units that they complete.

        Raises:
            UserError: too many pairs have the pair_id of another pair.
        """
        for row in range(table.num_rows):
            chunk = table.slice(row, 1)
            unit, number, last = (chunk[name][0].as_py() for name in ("unit", "chunk", "last"))
            self._chunks[unit][number] = chunk
            if last:
                self._counts[unit] = number + 1
            if len(self._chunks[unit]) == self._counts.get(unit):
                numbered = self._chunks.pop(unit)
                chunks = [numbered[index] for index in range(self._counts.pop(unit))]
                columns = {name: pa.concat_arrays([cell_values(part, name) for part in chunks]) for name in ROWS.names}
                rows = pa.table(columns)
                yield self._commit(unit, rows, chunks)
                self._repeated.add(rows.filter(pc.is_null(rows["reason"])))

    @retry_transient
    def _commit(self, unit: int, rows: pa.Table, chunks: Sequence[pa.Table]) -> UnitRecord:
        scores = {name: np.concatenate([pair_scores(chunk, name) for chunk in chunks]) for name in self._rewards}
        failed = {name: [why for chunk in chunks for why in pair_failures(chunk, name)] for name in self._rewards}
        table = _with_scores(rows, scores, failed)
        path = unit_path(self._run, unit)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)
            entry = {
                "name": f"{path.parent.name}/{path.name}",
                "bytes": temporary.stat().st_size,
                "sha256": sha256_file(temporary),
            }
        rejects = unit_rejects(table)
        record = UnitRecord(
            unit=unit,
            pairs_in=table.num_rows,
            pairs=table.num_rows - len(rejects),
            rejects=rejects,
            entry=entry,
        )
        self._run.commit(record)
        return record


def unit_path(run: Run, unit: int) -> AnyPath:
    """Return the file that holds a unit's rows until the whole table is written."""
    return run.record_path(unit).with_suffix(".parquet")


def read_unit_rows(path: AnyPath) -> pa.Table:
    """Read the file of a unit's rows.

    Raises:
        UserError: an earlier version wrote it, and did not keep all that the table holds.
    """
    rows = pq.read_table(arrow_source(path))
    missing = [name for name in ROWS.names if name not in rows.column_names]
    if missing:
        raise UserError(
            f"{path} is of an unfinished run of an earlier version, which kept no {', '.join(missing)}; finish it with "
            "that version, or start over with --overwrite"
        )
    return rows


def require_current_units(run: Run) -> None:
    """Refuse to continue a run of an earlier version before more units are scored.

    Raises:
        UserError: it is one.
    """
    any_unit = unit_path(run, 0)
    for path in list_files(any_unit.parent, f"*-{any_unit.name.partition('-')[2]}")[:1]:
        read_unit_rows(path)


def unit_rejects(table: pa.Table) -> list[Reject]:
    """Return the rows that are not scored, with their reasons."""
    rows = table.filter(pc.is_valid(table["reason"])).select(["pair_id", "source", "reason"]).to_pylist()
    return [Reject(stage=STAGE, **row) for row in rows]


def with_reasons(rows: pa.Table, reasons: Sequence[str | None]) -> pa.Table:
    """Replace the column ``reason``."""
    return rows.set_column(rows.column_names.index("reason"), "reason", pa.array(reasons, pa.string()))


def _with_scores(
    rows: pa.Table, scores: Mapping[str, np.ndarray], failed: Mapping[str, Sequence[str | None]]
) -> pa.Table:
    """Add two float32 columns per reward to all rows of a unit, and reject pairs with a score that is not finite."""
    scored = np.flatnonzero(pc.is_null(rows["reason"]).to_numpy())
    reasons = rows["reason"].to_pylist()
    for name, values_P2 in scores.items():
        with np.errstate(over="ignore"):
            columns_P2 = values_P2.astype(np.float32)
        not_finite = f"{RejectKind.NOT_FINITE}: {name} gave no number for an image of this pair"
        for pair in np.flatnonzero(~np.isfinite(columns_P2).all(axis=1)).tolist():
            position, reason = scored[pair], failed[name][pair]
            reasons[position] = reasons[position] or (f"{reason} ({name})" if reason else not_finite)
        for index in range(2):
            column = np.full(rows.num_rows, np.nan, dtype=np.float32)
            column[scored] = columns_P2[:, index]
            rows = rows.append_column(f"{name}_{index}", pa.array(column))
    return with_reasons(rows, reasons)
