"""Columns of the candidates beyond a pair's own, such as a category or the seed of an image.

A column whose name has ``_0``, and another with ``_1`` in its place (``noise_0`` and ``noise_1``), are about one image
each and follow it. Any other column is about the row: it is kept where the rows of both images have the same value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.files import arrow_source, reading_parquet
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs import PairColumns

_FIRST, _SECOND = re.compile(r"_0(?=_|$)"), re.compile(r"_1(?=_|$)")

_Values = Mapping[str, Any]


@dataclass(frozen=True)
class ImageColumns:
    """What the columns say about one image.

    Attributes:
        row: values of the columns about its row.
        image: values of the columns about itself, by the name of the first image's column.
    """

    row: _Values
    image: _Values


class FurtherColumns:
    """The columns that pairs take along from the candidates' Parquet files; those of JSONL files are left out.

    Attributes:
        types: Arrow type by name.
    """

    def __init__(self, columns: Mapping[AnyPath, PairColumns], taken: Collection[str]) -> None:
        """Find the columns.

        Args:
            columns: of each file.
            taken: names of the output's own columns.
        """
        types: dict[str, pa.DataType] = {}
        for path, used in columns.items():
            if path.suffix == ".parquet":
                for field in _fields(path):
                    if field.name not in {*taken, *astuple(used)}:
                        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
                        types[field.name] = kind if types.get(field.name, kind) == kind else pa.null()
        usable = {name: kind for name, kind in types.items() if not _is_binary(kind) and not pa.types.is_null(kind)}
        # With a chosen and a rejected image, image_0 is drawn, so nothing tells which of its columns is whose.
        numbered = not any(used.chosen for used in columns.values())
        self._images: dict[str, str] = {}
        self._rows: list[str] = []
        for name, kind in usable.items():
            second = _FIRST.sub("_1", name)
            if second == name and not _SECOND.search(name):
                self._rows.append(name)
            elif numbered and second != name and usable.get(second) == kind:
                self._images[name] = second
        self.types = {name: usable[name] for name in (*self._rows, *self._images, *self._images.values())}

    def of_image(self, further: _Values, side: int) -> ImageColumns:
        """Return what a row's columns say about its image_0 or image_1."""
        names = ((first, (first, second)[side]) for first, second in self._images.items())
        row = {name: further.get(name) for name in self._rows}
        return ImageColumns(row, {first: further.get(name) for first, name in names})

    def of_pair(self, images: Sequence[ImageColumns]) -> dict[str, Any]:
        """Return the columns of a pair of two images."""
        zero, one = images
        values = {name: zero.row[name] if zero.row[name] == one.row[name] else None for name in self._rows}
        values |= {name: zero.image[name] for name in self._images}
        return values | {second: one.image[first] for first, second in self._images.items()}


def _fields(path: AnyPath) -> Iterable[pa.Field]:
    with reading_parquet(path):
        return list(pq.read_schema(arrow_source(path)))


def _is_binary(kind: pa.DataType) -> bool:
    """Whether a type holds bytes, which may be further images."""
    if pa.types.is_nested(kind):
        return any(_is_binary(kind.field(index).type) for index in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
