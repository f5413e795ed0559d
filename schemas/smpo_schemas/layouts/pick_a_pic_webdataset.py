"""The WebDataset mirror of Pick-a-Pic v2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import Layout


class PickAPicWebDataset(Layout):
    """A sample is a pair; its labels are numbers written as text."""

    name: ClassVar[str] = "pick-a-pic-webdataset"
    data_sets: ClassVar[str] = "sayakpaul/pickapic_v2_webdataset (tars)"
    required: ClassVar[tuple[str, ...]] = ("jpg_0.jpg", "jpg_1.jpg", "original_prompt.txt")
    optional: ClassVar[tuple[str, ...]] = ("label_0.txt",)
    columns: PairColumns = PairColumns("original_prompt.txt", "jpg_0.jpg", "jpg_1.jpg", "label_0.txt")

    def convert(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """See the base class."""
        text = row.get("label_0.txt")
        try:
            return {**row, "label_0.txt": None if text in (None, "", "None") else float(text)}
        except (TypeError, ValueError, OverflowError):
            return row
