"""The safetensors format (https://huggingface.co/docs/safetensors), read and written a part at a time.

The safetensors library opens whole files, reads all of the bytes that it is given, and writes only tensors that are in
memory as a whole.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath

_TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
"""The dtypes that shards use, by safetensors' names."""

_NAMES = {dtype: name for name, dtype in _TYPES.items()}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor, by name."""


def read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """Read ``length`` bytes from ``offset`` on.

    Raises:
        OSError: the range is outside the file.
    """
    # Check first: read() would allocate an absurd length of a damaged index.
    size = file.seek(0, os.SEEK_END)
    if not (0 <= offset <= size and 0 <= length <= size - offset):
        raise OSError(f"the file has no {length} bytes at {offset}")
    file.seek(offset)
    return file.read(length)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, at byte ``offset``."""

    file: BinaryIO
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: int | slice) -> StoredTensor:
        """Select a row along the first axis, or consecutive rows."""
        part = StoredTensor(self.file, self.offset, self.dtype, self.shape[1:])
        if isinstance(rows, int):
            return StoredTensor(self.file, self.offset + rows * part.num_bytes, self.dtype, part.shape)
        begin, end, _ = rows.indices(self.shape[0])
        shape = (end - begin, *part.shape)
        return StoredTensor(self.file, self.offset + begin * part.num_bytes, self.dtype, shape)

    def read(self) -> torch.Tensor:
        """Read the values.

        Raises:
            OSError: the file ends before them.
        """
        # torch.frombuffer warns unless the buffer is writable, which bytes is not.
        content = bytearray(read_at(self.file, self.offset, self.num_bytes))
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape)


class TensorFile:
    """The tensors of a safetensors file, or of one within another file, by name."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        """Read the header of the safetensors content that is the ``length`` bytes at ``offset``.

        Raises:
            OSError, ValueError, struct.error: it is cut or malformed.
        """
        (size,) = struct.unpack("<Q", read_at(file, offset, 8))
        self._file, self._begin, self._num_bytes = file, offset + 8 + size, length - 8 - size
        if self._num_bytes < 0:
            raise ValueError(f"its header has {size} bytes, it has {length}")
        self._header = json.loads(read_at(file, offset + 8, size))

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._header)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def __getitem__(self, name: str) -> StoredTensor:
        """Locate a tensor and check its header entry.

        Raises:
            ValueError, KeyError, TypeError: it is missing, or its entry is malformed.
        """
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        tensor = StoredTensor(self._file, self._begin + begin, _TYPES[entry["dtype"]], tuple(entry["shape"]))
        if not all(type(number) is int and number >= 0 for number in (begin, end, *tensor.shape)):
            raise ValueError(f"{name} has the shape {entry['shape']} and lies at {begin} to {end}")
        if tensor.num_bytes != end - begin or end > self._num_bytes:
            raise ValueError(f"{name} of {tensor.num_bytes} bytes lies at {begin} to {end} of {self._num_bytes}")
        return tensor


@contextmanager
def reading_tensors(path: AnyPath, remedy: str) -> Iterator[None]:
    """Turn what a missing, cut or malformed file raises into :class:`UserError`; ``remedy`` ends its message."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {remedy}") from error
    except (struct.error, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is malformed: {error}; {remedy}") from error


def file_bytes(layout: Layout) -> int:
    """Compute the bytes of a file of these tensors."""
    header, offsets = _header(layout)
    return len(header) + max((end for _, end in offsets.values()), default=0)


def write_rows(path: Path, layout: Layout, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Write a file whose tensors share their first axis; equal tensors give equal bytes.

    Args:
        path: path of the file.
        layout: dtype and shape of the whole tensors.
        batches: the next rows of every tensor, until all are given.

    Raises:
        ValueError: the rows do not fill the layout.
    """
    header, offsets = _header(layout)
    starts = {name: begin for name, (begin, _) in offsets.items()}
    with path.open("wb") as file:
        file.write(header)
        for batch in batches:
            for name, (dtype, shape) in layout.items():
                value = batch[name]
                if value.dtype != dtype or tuple(value.shape[1:]) != shape[1:]:
                    raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}")
                data = value.contiguous().view(-1).view(torch.uint8).numpy().data
                file.seek(len(header) + starts[name])
                file.write(data)
                starts[name] += len(data)
    if starts != {name: end for name, (_, end) in offsets.items()}:
        raise ValueError(f"{path}: the rows end at {starts}, expected {offsets}")


def _header(layout: Layout) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return a file's header, and where each tensor's data begin and end after it."""
    described, offsets, end = {}, {}, 0
    for name, (dtype, shape) in layout.items():
        offsets[name] = (end, end + math.prod(shape) * dtype.itemsize)
        end = offsets[name][1]
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": list(offsets[name])}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
