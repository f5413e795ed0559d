"""Write ``pairs.parquet``, a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_schemas.generation.selection import SELECTED_SCHEMA

_GROUP_BYTES = 64 << 20
_GROUP_ROWS = 256


class PairsFile:
    """Writes rows in groups that are cut by the rows alone.

    Groups are small, since a reader may take a group's images into memory at once.
    """

    def __init__(self, path: Path, further: Mapping[str, pa.DataType]) -> None:
        """Open the file; ``further`` are columns beyond :data:`SELECTED_SCHEMA`."""
        self._schema = pa.schema([*SELECTED_SCHEMA, *further.items()])
        images = {"image_0", "image_1"}
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            # Image files do not repeat and are compressed already.
            use_dictionary=[name for name in self._schema.names if name not in images],
            compression={name: "none" if name in images else "snappy" for name in self._schema.names},
            write_statistics=[name for name in self._schema.names if name not in images],
        )
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        self._rows.append(row)
        self._bytes += len(row["image_0"]) + len(row["image_1"])
        if self._bytes >= _GROUP_BYTES or len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0
