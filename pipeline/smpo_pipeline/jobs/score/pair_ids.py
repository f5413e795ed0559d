"""One id, one pair: which rows have a pair_id that an earlier row gave to another pair.

Of each id sixteen bytes are kept, whatever its length. Two of 100 million ids share their 64 bits with a probability of
3e-4; the later pair would be rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from smpo_common.errors import UserError
from smpo_pipeline.jobs.record.reject_rate import MIN_ROWS
from smpo_schemas.scores import IMAGE_IDS

_CONTENT = ("prompt", *IMAGE_IDS)
_LOOKED_AT = 1 << 20


class PairIds:
    """What each id stands for, of the rows so far."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        """Digests of ids, in ascending order, and of what they stand for; each run more than the next one."""

    def taken(self, rows: pa.Table) -> np.ndarray:
        """Bool [R]: whether an earlier row (or one of these, before it) has the id for another prompt or other images.

        A pair that several people labelled is there several times, and is the same one.
        """
        ids_R, contents_R = _digests(rows, ["pair_id"]), _digests(rows, _CONTENT)
        ids, firsts, number_R = np.unique(ids_R, return_index=True, return_inverse=True)
        contents, new = contents_R[firsts], np.ones(len(ids), bool)
        for run_ids, run_contents in self._runs:
            at = np.minimum(np.searchsorted(run_ids, ids), len(run_ids) - 1)
            known = run_ids[at] == ids
            contents[known] = run_contents[at[known]]
            new &= ~known
        self._keep(ids[new], contents[new])
        return contents[number_R] != contents_R

    def _keep(self, ids: np.ndarray, contents: np.ndarray) -> None:
        """Add a run, merged with those that are no larger: each id is moved as often as the runs have doubled."""
        while self._runs and len(self._runs[-1][0]) <= len(ids):
            more_ids, more_contents = self._runs.pop()
            ids, contents = np.concatenate([more_ids, ids]), np.concatenate([more_contents, contents])
            order = np.argsort(ids, kind="stable")  # of two sorted runs: one merge
            ids, contents = ids[order], contents[order]
        if len(ids):
            self._runs.append((ids, contents))


class RepeatedIds:
    """Stops a run in whose ids other things than pairs are named, while little is scored.

    Of the first million rows that are committed, in whatever order; which rows are left out of the table is decided
    when it is written.
    """

    def __init__(self, limit: float) -> None:
        """``limit``: ``--max-reject-rate``."""
        self._limit, self._ids = limit, PairIds()
        self._rows = self._repeated = 0

    def add(self, rows: pa.Table) -> None:
        """Look at a unit's rows of which nothing else is wrong.

        Raises:
            UserError: more than the limit of the rows so far, or of :data:`MIN_ROWS` if that is more, repeat an id.
        """
        if self._rows >= _LOOKED_AT:
            return
        taken = self._ids.taken(rows)
        self._rows += len(taken)
        self._repeated += int(taken.sum())
        if taken.any() and self._repeated > self._limit * max(self._rows, MIN_ROWS):
            example = rows.slice(int(taken.argmax()), 1).to_pylist()[0]
            raise UserError(
                f"stopped: {self._repeated} of {self._rows} pairs have the pair_id of another pair (for example "
                f"{example['source']}: {example['pair_id']!r}), more than --max-reject-rate {self._limit:g} allows; "
                "name a column that tells pairs apart with --pair-id-column"
            )


def _digests(rows: pa.Table, columns: Sequence[str]) -> np.ndarray:
    """uint64 [R]: of what the columns say; the ids of images, which follow a prompt, are all of one length."""
    texts = ("".join(row) for row in zip(*(rows[name].to_pylist() for name in columns), strict=True))
    digests = (blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), np.uint64)
