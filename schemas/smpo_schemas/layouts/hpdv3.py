"""HPDv3 (arXiv 2508.03789) and HPDv3++."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import Layout
from smpo_schemas.pairs.normalising import PairRejectedError
from smpo_schemas.reject_kinds import RejectKind


class HPDv3(Layout):
    """A JSON list in which ``path1`` is always the preferred image.

    ``choice_dist`` counts the votes of both images, in either order, so that the larger count is the preferred one's.
    """

    name: ClassVar[str] = "hpdv3"
    data_sets: ClassVar[str] = "MizzenAI/HPDv3, Junjun2333/HPDv3-PlusPlus (JSON lists)"
    uses: ClassVar[frozenset[str]] = frozenset({"min_confidence"})
    required: ClassVar[tuple[str, ...]] = ("prompt", "path1", "path2")
    optional: ClassVar[tuple[str, ...]] = ("confidence", "choice_dist", "model1", "model2")
    columns: PairColumns = PairColumns("prompt", None, None, "label", chosen="path1", rejected="path2", votes="votes")
    derived: Mapping[str, str] = {
        "label": "path1 preferred, by the larger share of choice_dist",
        "votes": "the sum of choice_dist",
    }
    further: Sequence[str] = ("confidence", "model_0", "model_1")

    def convert(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """See the base class."""
        confidence, least = row.get("confidence"), self.choices.min_confidence
        if least is not None and isinstance(confidence, (int, float)) and not confidence >= least:
            raise PairRejectedError(f"{RejectKind.LOW_CONFIDENCE}: {confidence:g} is below {least:g}")
        counts: Any = row.get("choice_dist")
        try:
            total = float(sum(counts))
        except (TypeError, OverflowError):  # not a list of numbers, or beyond any float
            total = 0.0
        return {
            **row,
            "label": max(counts) / total if 0 < total < math.inf else 1.0,
            "votes": int(total) if 1 < total < math.inf else None,
            "model_0": row.get("model1"),
            "model_1": row.get("model2"),
        }
