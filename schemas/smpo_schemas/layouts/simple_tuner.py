"""SimpleTuner's two data sets for Flow-DPO: its data backend configuration names both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from smpo_common.errors import UserError
from smpo_schemas.layouts.image_folders import image_names, paired
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import ListedLayout
from smpo_schemas.pairs.raw_rows import RawRow

_REJECTED = "reference_strict"


class SimpleTuner(ListedLayout):
    """Preferred images, in a data set whose ``conditioning_data`` names that of the rejected ones.

    The ``conditioning_type`` of the rejected images' data set is ``reference_strict``.
    """

    name: ClassVar[str] = "simpletuner"
    data_sets: ClassVar[str] = (
        "SimpleTuner's `multidatabackend.json` with a preferred and a `reference_strict` data set"
    )
    required: ClassVar[tuple[str, ...]] = ("id", "instance_data_dir", "conditioning_type")
    optional: ClassVar[tuple[str, ...]] = (
        "type",
        "conditioning_data",
        "source_dataset_id",
        "caption_strategy",
        "instance_prompt",
    )
    columns: PairColumns = PairColumns(image_0=None, image_1=None, chosen="chosen", rejected="rejected")
    derived: Mapping[str, str] = {"prompt": "the preferred data set's caption_strategy"}

    def list_pairs(self, rows: Iterator[RawRow]) -> pa.Table:
        """See the base class.

        Raises:
            UserError: no data set has rejected images, or one is not local or has another caption strategy.
        """
        data_sets = {row["id"]: row for row in rows if isinstance(row, Mapping) and isinstance(row.get("id"), str)}
        tables = [
            self._pair_up(chosen, rejected)
            for name, chosen in data_sets.items()
            for rejected in self._rejected_of(name, chosen, data_sets)
        ]
        if not tables:
            raise UserError(f"{self.path}: no data set has one with conditioning_type {_REJECTED} as conditioning_data")
        return pa.concat_tables(tables)

    @staticmethod
    def _rejected_of(
        name: str, chosen: Mapping[str, Any], data_sets: Mapping[str, Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        given = chosen.get("conditioning_data")
        named = given if isinstance(given, list) else [given]
        return [
            other
            for key, other in data_sets.items()
            if other.get("conditioning_type") == _REJECTED and (key in named or other.get("source_dataset_id") == name)
        ]

    def _pair_up(self, chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> pa.Table:
        folders = [self._folder(each) for each in (chosen, rejected)]
        strategy = chosen.get("caption_strategy") or "textfile"
        names = image_names(folders[0])
        captions: dict[str, str | None] | None
        if strategy == "textfile":
            captions = None
        elif strategy == "filename":
            captions = {name: name.rpartition("/")[2].replace("_", " ") for name in names}
        elif strategy == "instanceprompt":
            captions = dict.fromkeys(names, str(chosen.get("instance_prompt")))
        else:
            raise UserError(
                f"{self.path}: caption_strategy {strategy!r} of {chosen['id']} is not read; use textfile, filename or "
                "instanceprompt"
            )
        return paired(folders[0], folders[1], captions=captions)

    def _folder(self, data_set: Mapping[str, Any]) -> Path:
        if data_set.get("type", "local") != "local":
            raise UserError(
                f"{self.path}: data set {data_set['id']} is of type {data_set['type']}; only local ones are read"
            )
        name = str(data_set.get("instance_data_dir"))
        folder = Path(str(self.folder), name)
        if not _is_folder(folder):
            raise UserError(
                f"{self.path}: instance_data_dir {name!r} of {data_set['id']} is no folder "
                "here; name the folder that it is relative to with --image-root"
            )
        return folder


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no folder can have
        return False
