"""Arrow tables of one row whose cells are lists: the form in which a unit or a chunk travels through Ray.

Ray Data may split a block between any two rows, but never within one: what is in one row stays together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa


def list_cell(values: pa.Array) -> pa.Array:
    """Make a column of one row, whose cell is the list of ``values``."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


def bytes_array(data: object, ends: Sequence[int] | np.ndarray) -> pa.LargeBinaryArray:
    """Wrap a buffer as binary values, without a copy; ``ends`` holds 0, then the position where each value ends."""
    buffers = [None, pa.py_buffer(np.asarray(ends, np.int64)), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ends) - 1, buffers)


def cell_values(row: pa.Table, name: str) -> pa.Array:
    """Return the values of a list cell of a one-row table, without a copy."""
    # combine_chunks copies, even a single chunk.
    return next(chunk for chunk in row[name].chunks if len(chunk)).flatten()


def byte_views(values: pa.LargeBinaryArray) -> Iterator[np.ndarray]:
    """Yield each value as uint8 [bytes], a view of Arrow's buffer; converting Arrow's own scalars would copy."""
    if not len(values):
        return
    _, ends_buffer, data_buffer = values.buffers()
    ends, data = np.frombuffer(ends_buffer, np.int64)[values.offset :], np.frombuffer(data_buffer, np.uint8)
    for start, end in pairwise(ends[: len(values) + 1]):
        yield data[start:end]
