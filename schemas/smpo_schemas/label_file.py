"""Files of people's votes on pairs: output of ``smpo-pipeline vote``, one row per pair and annotator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import arrow_source, reading_parquet
from smpo_common.store_path import AnyPath

LABELS_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("label", pa.float32()),
        ("annotator", pa.string()),
        ("time", pa.timestamp("ms", tz="UTC")),
    ]
)
"""``label``: P(image_0 preferred): 1, 0, or 0.5 for a tie."""


@dataclass(frozen=True)
class PairVotes:
    """The votes on a pair: their mean, P(image_0 preferred), their number, and the annotator if there is one vote."""

    label: float
    votes: int
    annotator: str | None


def read_label_rows(path: AnyPath, flag: str = "--labels") -> pa.Table:
    """Read a file of votes; ``annotator`` and ``time`` may be missing, and are then null.

    ``flag`` is the flag that named the file, for errors.

    Raises:
        UserError: the file does not exist, is damaged, lacks a column, or has a label outside 0..1.
    """
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist")
    with reading_parquet(path):
        table = pq.read_table(arrow_source(path))
    missing = [name for name in ("pair_id", "label") if name not in table.column_names]
    if missing:
        raise UserError(f"{flag} {path} has no column {missing[0]!r}; expected the output of `smpo-pipeline vote`")
    for field in LABELS_SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    with reading_parquet(path):
        table = table.select(LABELS_SCHEMA.names).cast(LABELS_SCHEMA)
    if table["pair_id"].null_count or table["label"].null_count:
        raise UserError(f"{flag} {path}: a row has no pair_id or no label; remove it")
    for label in table["label"].to_pylist():
        if not 0 <= label <= 1:
            raise UserError(f"{flag} {path}: a label is {label}; expected P(image_0 preferred), from 0 to 1")
    return table


def read_labels(path: AnyPath) -> Mapping[str, PairVotes]:
    """Read a file of votes by pair id.

    Raises:
        UserError: as for :func:`read_label_rows`.
    """
    grouped: dict[str, list[tuple[float, str | None]]] = {}
    for row in read_label_rows(path).to_pylist():
        grouped.setdefault(row["pair_id"], []).append((row["label"], row["annotator"]))
    return {
        pair_id: PairVotes(
            sum(label for label, _ in votes) / len(votes), len(votes), votes[0][1] if len(votes) == 1 else None
        )
        for pair_id, votes in grouped.items()
    }


def with_labels(pairs: pa.Table, labels: Mapping[str, PairVotes]) -> pa.Table:
    """Replace label, votes and annotator of the rows whose ``pair_id`` has votes.

    Args:
        pairs: a table with these four columns.
        labels: the votes by pair id.
    """
    if not labels:
        return pairs
    votes = pa.Table.from_pylist([{"pair_id": pair_id, **asdict(given)} for pair_id, given in labels.items()])
    place = pc.index_in(pairs["pair_id"], votes["pair_id"])
    voted = pc.is_valid(place)
    for name in ("label", "votes", "annotator"):
        column = pairs.schema.field(name)
        given = votes[name].take(place.combine_chunks()).cast(column.type)
        pairs = pairs.set_column(pairs.schema.get_field_index(name), column, pc.if_else(voted, given, pairs[name]))
    return pairs
