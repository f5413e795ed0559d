"""HPDv2's training pairs (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from smpo_common.store_path import AnyPath
from smpo_schemas.labels import TIE
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import Layout
from smpo_schemas.pairs.normalising import PairRejectedError
from smpo_schemas.reject_kinds import RejectKind

_IMAGES = 2


class HPDv2(Layout):
    """``train.json``: two paths, and 1 for the preferred one; the images may be in ``train/``."""

    name: ClassVar[str] = "hpdv2"
    data_sets: ClassVar[str] = "ymhao/HPDv2, `train.json`"
    required: ClassVar[tuple[str, ...]] = ("prompt", "file_path", "human_preference")
    optional: ClassVar[tuple[str, ...]] = ("user_hash",)
    columns: PairColumns = PairColumns(label="label", annotator="user_hash")
    derived: Mapping[str, str] = {
        "image_0": "file_path[0]",
        "image_1": "file_path[1]",
        "label": "human_preference",
    }

    def convert(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """See the base class."""
        paths, choices = row.get("file_path"), row.get("human_preference")
        if not isinstance(paths, list) or len(paths) != _IMAGES:
            raise PairRejectedError(f"{RejectKind.NO_IMAGE}: file_path is not a list of two paths")
        if not isinstance(choices, list) or len(choices) != _IMAGES or not all(type(each) is int for each in choices):
            raise PairRejectedError(f"{RejectKind.BAD_LABEL}: human_preference is not a list of two integers")
        label = TIE if choices[0] == choices[1] else float(choices[0] > choices[1])
        return {**row, "image_0": paths[0], "image_1": paths[1], "label": label}

    def image_folders(self) -> list[AnyPath]:
        """See the base class."""
        return [self.folder, self.folder / "train"]
