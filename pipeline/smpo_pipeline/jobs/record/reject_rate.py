"""``--max-reject-rate``: stop a run with too many rejects."""

from __future__ import annotations

from collections import Counter

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.record.run_record import UnitRecord
from smpo_schemas.reject_kinds import LEFT_OUT
from smpo_schemas.rejects import Reject, count_reasons

MIN_ROWS = 200
"""Smallest number of rows that the rate refers to: a few rejects among the first rows, or in a small input, do not
count."""


class RejectRate:
    """Counts rows and rejects as units are committed."""

    def __init__(self, limit: float, out: AnyPath, noun: str = "pairs") -> None:
        """Take the largest share of rejects, 0 to 1, the folder of the run, and what a row is called."""
        self._limit, self._out, self._noun = limit, out, noun
        self._rows = self.rejected = self._counted = 0
        self._kinds: Counter[str] = Counter()
        self._example: Reject | None = None

    def add(self, record: UnitRecord) -> None:
        """Count a unit; rows that the user asked to leave out do not count as rejects.

        Raises:
            UserError: the share of rejects among max(rows so far, :data:`MIN_ROWS`) is above the limit.
        """
        rejects = [reject for reject in record.rejects if reject.kind not in LEFT_OUT]
        self._rows += record.pairs_in
        self.rejected += len(record.rejects)
        self._counted += len(rejects)
        self._kinds.update(count_reasons(rejects))
        self._example = self._example or next(iter(rejects), None)
        if self._example and self._counted > self._limit * max(self._rows, MIN_ROWS):
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
            raise UserError(
                f"stopped: {self._counted} of {self._rows} {self._noun} were rejected, more than --max-reject-rate "
                f"{self._limit:g} allows ({kinds}; for example {self._example.source}: {self._example.reason}); to "
                f"continue in {self._out} without them, run the same command with a higher --max-reject-rate"
            )
