"""A chosen and a rejected image of a prompt, in the columns that TRL names."""

from __future__ import annotations

from typing import ClassVar

from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import Layout


class ChosenRejected(Layout):
    """The columns are ``prompt``, ``chosen`` and ``rejected``."""

    name: ClassVar[str] = "chosen-rejected"
    data_sets: ClassVar[str] = "data-is-better-together/open-image-preferences-v1-binarized, and others like it"
    required: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")
    optional: ClassVar[tuple[str, ...]] = ("pair_id", "annotator")
    columns: PairColumns = PairColumns(
        image_0=None, image_1=None, pair_id="pair_id", annotator="annotator", chosen="chosen", rejected="rejected",
    )  # fmt: skip


class BetterWorse(ChosenRejected):
    """ImageRewardDB's own pairs."""

    name: ClassVar[str] = "image-reward-pairs"
    data_sets: ClassVar[str] = "zai-org/ImageRewardDB, configurations that end in `_pair`, saved as Parquet"
    required: ClassVar[tuple[str, ...]] = ("prompt", "img_better", "img_worse")
    columns: PairColumns = PairColumns(image_0=None, image_1=None, chosen="img_better", rejected="img_worse")
