"""``rejected.parquet``: the pairs that were left out, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.files import arrow_source, atomic_path, reading_parquet
from smpo_common.store_path import AnyPath
from smpo_schemas.frozen import FrozenModel

REJECTS_FILE = "rejected.parquet"

REJECT_SCHEMA = pa.schema(
    [("pair_id", pa.string()), ("source", pa.string()), ("stage", pa.string()), ("reason", pa.string())]
)


class Reject(FrozenModel):
    """One pair that was left out.

    Attributes:
        pair_id: the pair's id; None if it was not known yet.
        source: the pair's file and row, as ``path:row``.
        stage: the command that rejected it.
        reason: one sentence; the words before the first colon are its kind.
    """

    pair_id: str | None
    source: str
    stage: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]


def write_rejects(path: AnyPath, rejects: Sequence[Reject]) -> None:
    """Write ``rejected.parquet``; without rejects it has no rows."""
    table = pa.Table.from_pylist([reject.model_dump() for reject in rejects], schema=REJECT_SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_rejects(path: AnyPath) -> list[Reject]:
    """Read ``rejected.parquet``.

    Raises:
        UserError: it is missing or damaged, or has other columns.
    """
    with reading_parquet(path):
        table = pq.ParquetFile(arrow_source(path)).read().select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)
        table.validate(full=True)
        return [Reject(**row) for row in table.to_pylist()]


def count_reasons(rejects: Sequence[Reject]) -> dict[str, int]:
    """Count each kind of reason, most frequent first."""
    return dict(Counter(reject.kind for reject in rejects).most_common())
