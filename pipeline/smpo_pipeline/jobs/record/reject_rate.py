"""``--max-reject-rate``: a run that is going wrong stops."""

from __future__ import annotations

from collections import Counter

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_pipeline.jobs.record.run_record import UnitRecord
from smpo_schemas.rejects import Reject, count_reasons

MIN_ROWS = 200
"""The rate is of at least so many rows: a few bad ones among the first are no sign, nor are they in a small input."""


class RejectRate:
    """Counts rows and rejects as units are committed."""

    def __init__(self, limit: float, out: AnyPath) -> None:
        """``limit``: rejects a row, 0 to 1; ``out``: the run's directory, for the message."""
        self._limit, self._out = limit, out
        self._rows = self.rejected = 0
        self._kinds: Counter[str] = Counter()
        self._example: Reject | None = None

    def add(self, record: UnitRecord) -> None:
        """Count a unit.

        Raises:
            UserError: more than the limit of the rows so far, or of :data:`MIN_ROWS` if that is more, were rejected.
        """
        self._rows += record.pairs_in
        self.rejected += len(record.rejects)
        self._kinds.update(count_reasons(record.rejects))
        self._example = self._example or next(iter(record.rejects), None)
        if self._example and self.rejected > self._limit * max(self._rows, MIN_ROWS):
            kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
            raise UserError(
                f"stopped: {self.rejected} of {self._rows} pairs were rejected, more than --max-reject-rate "
                f"{self._limit:g} allows ({kinds}; for example {self._example.source}: {self._example.reason}); to go "
                f"on in {self._out} without them, give the same command a higher --max-reject-rate"
            )
