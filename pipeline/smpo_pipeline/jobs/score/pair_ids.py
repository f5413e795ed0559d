"""Find rows whose pair_id belongs to another pair.

Only hashes are kept, 16 bytes per id. Among 100 million ids two have the same 64-bit hash with a probability of 3e-4;
the later pair would be rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from smpo_common.errors import UserError
from smpo_pipeline.jobs.record.reject_rate import MIN_ROWS
from smpo_schemas.scoring.scores import IMAGE_IDS

_CONTENT = ("prompt", *IMAGE_IDS)
_CHECKED_ROWS = 1 << 20


class PairIds:
    """The pair of each id, by hashes, in the rows so far."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        """Sorted runs of (hashes of ids, hashes of their pairs), each longer than the next, as in a merge sort."""

    def repeated(self, rows: pa.Table) -> np.ndarray:
        """Check and remember some rows.

        A pair that several annotators labelled has several rows with its id, prompt and images, which is allowed.

        Returns:
            Bool [R]: whether an earlier row, or one of these before it, has the id for another prompt or other images.
        """
        ids_R, pairs_R = _hashes(rows, ["pair_id"]), _hashes(rows, _CONTENT)
        ids, firsts, number_R = np.unique(ids_R, return_index=True, return_inverse=True)
        pairs, new = pairs_R[firsts], np.ones(len(ids), bool)
        for run_ids, run_pairs in self._runs:
            at = np.minimum(np.searchsorted(run_ids, ids), len(run_ids) - 1)
            known = run_ids[at] == ids
            pairs[known] = run_pairs[at[known]]
            new &= ~known
        self._add(ids[new], pairs[new])
        return pairs[number_R] != pairs_R

    def _add(self, ids: np.ndarray, pairs: np.ndarray) -> None:
        """Add a run, merged with those that are not larger: each id is moved once per doubling."""
        while self._runs and len(self._runs[-1][0]) <= len(ids):
            more_ids, more_pairs = self._runs.pop()
            ids, pairs = np.concatenate([more_ids, ids]), np.concatenate([more_pairs, pairs])
            order = np.argsort(ids, kind="stable")  # a single merge, since both parts are sorted
            ids, pairs = ids[order], pairs[order]
        if len(ids):
            self._runs.append((ids, pairs))


class RepeatedIds:
    """Stops a run early if its pair_id column does not identify pairs.

    Checks the first million rows that are committed, in any order. Rejects are decided later, in input order, when the
    table is written.
    """

    def __init__(self, limit: float) -> None:
        """Take ``--max-reject-rate`` as the limit."""
        self._limit, self._ids = limit, PairIds()
        self._rows = self._repeated = 0

    def add(self, rows: pa.Table) -> None:
        """Check a unit's rows that have scores.

        Raises:
            UserError: the share of repeated ids among max(rows so far, :data:`MIN_ROWS`) is above the limit.
        """
        if self._rows >= _CHECKED_ROWS:
            return
        repeated = self._ids.repeated(rows)
        self._rows += len(repeated)
        self._repeated += int(repeated.sum())
        if repeated.any() and self._repeated > self._limit * max(self._rows, MIN_ROWS):
            example = rows.slice(int(repeated.argmax()), 1).to_pylist()[0]
            raise UserError(
                f"stopped: {self._repeated} of {self._rows} pairs have the pair_id of another pair (for example "
                f"{example['source']}: {example['pair_id']!r}), more than --max-reject-rate {self._limit:g} allows; "
                "name a column that identifies pairs with --pair-id-column"
            )


def _hashes(rows: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """Hash the joined columns of each row: uint64 [R]."""
    # Joined without a separator: only the first column varies in length.
    texts = ("".join(row) for row in zip(*(rows[name].to_pylist() for name in columns), strict=True))
    digests = (blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), np.uint64)
