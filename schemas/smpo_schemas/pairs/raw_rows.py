"""Rows of a file as they are stored, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.normalising import PairRejectedError

MARK_EVERY = 1024
"""The byte offset of every 1024th row is recorded, so that a slice can seek to its start."""

RawRow = Mapping[str, Any] | PairRejectedError
"""A row's values by column, or why it cannot be read."""


class NotRowsError(UserError):
    """The file holds something other than rows, such as the settings of a program."""


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` (included) to ``stop`` (excluded) of one input file.

    ``seek_to`` is a row not after ``start`` and its byte offset, from which JSON and tars are read.
    """

    path: AnyPath
    start: int
    stop: int
    seek_to: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scan:
    """What one pass over a file finds.

    Attributes:
        rows: number of rows.
        bytes: size of the file.
        digest: hash of the content, or of a part that identifies the content in practice.
        names: names of the columns.
        offsets: byte offsets of rows 0, 1024, 2048, ...; none where a format needs no offsets.
    """

    rows: int
    bytes: int
    digest: str
    names: Sequence[str]
    offsets: Sequence[int] = ()
