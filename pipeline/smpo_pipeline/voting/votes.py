"""The file of votes, which ``score`` and ``calibrate`` join to pairs by ``--labels``."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.files import atomic_path
from smpo_schemas.label_file import LABELS_SCHEMA, read_label_rows


@dataclass(frozen=True)
class Agreement:
    """Among the pairs that an annotator and others labelled: the number of others' votes, and of equal ones."""

    votes: int
    equal: int


class Votes:
    """Every vote, at most one per pair and annotator, in the order in which they were given.

    The file is replaced after each change, so that a killed server has lost nothing. Safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        """Read the file, if it exists.

        Raises:
            UserError: the file is not one of votes.
        """
        self.path = path
        self._lock = Lock()
        self._votes: dict[tuple[str, str], tuple[float, datetime]] = {}
        self._of_pair: dict[str, dict[str, float]] = defaultdict(dict)
        if path.exists():
            for row in read_label_rows(path, "--out").to_pylist():
                self._set(row["pair_id"], row["annotator"], row["label"], row["time"])

    def cast(self, pair_id: str, annotator: str, label: float) -> None:
        """Add a vote, in place of the annotator's earlier one on this pair.

        Args:
            pair_id: of the pair.
            annotator: who votes.
            label: P(image_0 preferred): 1, 0, or 0.5 for a tie.

        Raises:
            UserError: the file cannot be written.
        """
        with self._lock:
            self._set(pair_id, annotator, label, datetime.now(UTC))
            self._write()

    def undo(self, annotator: str) -> str | None:
        """Remove an annotator's latest vote; return its pair, or None where there is none.

        Raises:
            UserError: the file cannot be written.
        """
        with self._lock:
            pair_id = next((pair for pair, name in reversed(self._votes) if name == annotator), None)
            if pair_id is not None:
                del self._votes[pair_id, annotator]
                del self._of_pair[pair_id][annotator]
                self._write()
            return pair_id

    def of_pair(self, pair_id: str) -> dict[str, float]:
        """Return the labels of a pair by annotator."""
        with self._lock:
            return dict(self._of_pair.get(pair_id, {}))

    def agreement(self, annotator: str) -> Agreement:
        """Compare an annotator's labels with those of others."""
        with self._lock:
            compared = [
                (label, labels[annotator])
                for labels in self._of_pair.values()
                if annotator in labels
                for other, label in labels.items()
                if other != annotator
            ]
        return Agreement(len(compared), sum(theirs == own for theirs, own in compared))

    def _set(self, pair_id: str, annotator: str, label: float, time: datetime) -> None:
        self._votes.pop((pair_id, annotator), None)  # the latest vote comes last
        self._votes[pair_id, annotator] = label, time
        self._of_pair[pair_id][annotator] = label

    def _write(self) -> None:
        rows = [
            {"pair_id": pair_id, "label": label, "annotator": annotator, "time": time}
            for (pair_id, annotator), (label, time) in self._votes.items()
        ]
        with atomic_path(self.path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, LABELS_SCHEMA), temporary)
