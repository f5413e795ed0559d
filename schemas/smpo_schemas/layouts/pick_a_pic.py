"""Pick-a-Pic v1 and v2 as Parquet (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from smpo_schemas.pairs.columns import PICK_A_PIC, PairColumns
from smpo_schemas.pairs.layout import Layout


class PickAPic(Layout):
    """Images as bytes, labels 1, 0 and 0.5; where ``has_label`` is false the label means nothing."""

    name: ClassVar[str] = "pick-a-pic"
    data_sets: ClassVar[str] = "Pick-a-Pic v1 and v2, and mirrors such as pickapic-anonymous/pickapic_v1 (Parquet)"
    required: ClassVar[tuple[str, ...]] = ("caption", "jpg_0", "jpg_1")
    optional: ClassVar[tuple[str, ...]] = ("label_0", "has_label", "ranking_id", "user_id")
    columns: PairColumns = PICK_A_PIC

    def convert(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """See the base class."""
        return {**row, "label_0": None} if row.get("has_label") is False else row
