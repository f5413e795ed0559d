"""``text/`` beside the tars: each distinct prompt's embeddings once, so that training needs no text encoder.

``text-000000.safetensors``, ... hold, for their N prompts, ``key``, int64 [N], hashes of the prompts, and the outputs
of the text encoders, [N, ...] by the model family's names. Where the length of ``text`` depends on the prompt, the
prompts follow each other without padding, [sum of lengths, D], and ``text_end``, int64 [N], is where each one ends.
``index.safetensors`` gives the file and the row of every prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smpo_common.errors import UserError
from smpo_common.files import atomic_path, sha256_file
from smpo_common.store_path import AnyPath
from smpo_schemas.frozen import StoredFile
from smpo_schemas.manifest import StoredTextEntry, TextFile
from smpo_schemas.shards.tensor_file import Layout, TensorFile, file_bytes, reading_tensors, write_rows
from smpo_schemas.shards.text_rows import MASK, TEXT, TextRow

TEXT_INDEX = "index.safetensors"

TEXT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Dtype of the embeddings by ``--dtype``. Training in this dtype rounds to it before the first use anyway."""

_KEY = "key"
_END = "text_end"
_INDEX_COLUMNS = {_KEY: torch.int64, "file": torch.int32, "row": torch.int32, "cut": torch.bool}
_REMEDY = "copy the folder text/ again from where it was written, or invert again with --overwrite"


def text_file_name(number: int) -> str:
    """Return the name of a file of embeddings."""
    return f"text-{number:06d}.safetensors"


def prompt_keys(prompts: Iterable[str]) -> np.ndarray:
    """Hash each prompt: int64 [N]."""
    digests = [hashlib.sha256(prompt.encode()).digest()[:8] for prompt in prompts]
    return np.frombuffer(b"".join(digests), dtype=np.int64)


def write_text(path: AnyPath, prompts: Sequence[str], rows: Sequence[TextRow]) -> TextFile:
    """Write a file of embeddings atomically; equal embeddings give equal bytes.

    Args:
        path: path of the file.
        prompts: N distinct prompts, at least one.
        rows: the embeddings of each prompt, on the CPU.

    Raises:
        UserError: the file cannot be written.
    """
    layout = _file_layout(len(prompts), rows[0], sum(len(row[TEXT]) for row in rows))
    with atomic_path(path) as temporary:
        write_rows(temporary, layout, _columns(prompts, rows))
        return TextFile(name=path.name, prompts=len(prompts), **_described(temporary))


def write_text_index(path: AnyPath, prompts: Sequence[str], cut: Sequence[bool], prompts_per_file: int) -> StoredFile:
    """Write ``index.safetensors``.

    Args:
        path: path of the file.
        prompts: all prompts in the order of the files.
        cut: for each prompt, whether the text encoders truncate it.
        prompts_per_file: number of prompts in every file but the last.

    Raises:
        UserError: two prompts have one hash, or the file cannot be written.
    """
    keys = prompt_keys(prompts)
    order = np.argsort(keys, kind="stable")
    if (np.diff(keys[order]) == 0).any():
        raise UserError("two prompts have the same 64-bit hash; use --text live")
    files, rows = np.divmod(np.arange(len(keys)), prompts_per_file)
    columns = {_KEY: keys, "file": files, "row": rows, "cut": np.array(cut, dtype=np.bool_)}
    tensors = {name: torch.from_numpy(columns[name][order]).to(dtype) for name, dtype in _INDEX_COLUMNS.items()}
    with atomic_path(path) as temporary:
        write_rows(temporary, _index_layout(len(keys)), [tensors])
        return StoredFile(name=path.name, **_described(temporary))


def text_bytes(prompts: int, rows: Sequence[TextRow], prompts_per_file: int) -> int:
    """Estimate the bytes of ``text/`` for a number of prompts whose embeddings are like ``rows``."""
    length = sum(len(row[TEXT]) for row in rows) / len(rows)

    def size(count: int) -> int:
        return file_bytes(_file_layout(count, rows[0], round(count * length)))

    full, rest = divmod(prompts, prompts_per_file)
    return full * size(prompts_per_file) + file_bytes(_index_layout(prompts)) + (size(rest) if rest else 0)


class StoredText:
    """Embeddings of prompts, read row by row from the files; the index is in memory (17 bytes a prompt)."""

    def __init__(self, folder: AnyPath, entry: StoredTextEntry) -> None:
        """Read the index.

        Args:
            folder: ``text/``.
            entry: its part of the manifest.

        Raises:
            UserError: the index is missing, or differs from the manifest.
        """
        self.folder, self._entry = folder, entry
        path = folder / TEXT_INDEX
        _verify(path, entry.index)
        with reading_tensors(path, _REMEDY), path.open("rb") as file:
            tensors = TensorFile(file, 0, entry.index.bytes)
            columns = {name: tensors[name] for name in _INDEX_COLUMNS}
            layout = {name: (column.dtype, column.shape) for name, column in columns.items()}
            if layout != _index_layout(entry.prompts):
                raise ValueError(f"it holds {layout}, expected the places of {entry.prompts} prompts")
            self._keys, self._files, self._rows, self._cut = (column.read().numpy() for column in columns.values())
        held = np.array([file.prompts for file in entry.files])
        inside = (self._files >= 0) & (self._files < len(held)) & (self._rows >= 0)
        if not (inside.all() and (self._rows < held[self._files]).all() and (self._keys[1:] > self._keys[:-1]).all()):
            raise UserError(f"{path} names rows that {folder} does not have; {_REMEDY}")

    @property
    def num_files(self) -> int:
        """Number of files of embeddings."""
        return len(self._entry.files)

    def find(self, prompts: Sequence[str]) -> np.ndarray:
        """Return each prompt's place in the index, -1 if it has none: int64 [N]."""
        keys = prompt_keys(prompts)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[places] == keys, places, -1)

    def files_of(self, places: np.ndarray) -> np.ndarray:
        """Return the number of the file that holds each place."""
        return self._files[places]

    def cuts(self, prompt: str) -> bool:
        """Whether the text encoders truncated a prompt that is stored."""
        return bool(self._cut[self._place(prompt)])

    def __call__(self, prompts: Sequence[str]) -> list[TextRow]:
        """Read the embeddings of N prompts, one row per prompt, on the CPU.

        Raises:
            UserError: a prompt is not stored, or a file is missing, cut or not what the index says.
        """
        places = [self._place(prompt) for prompt in prompts]
        rows: list[TextRow] = [{} for _ in prompts]
        for number in sorted(set(self._files[places].tolist())):
            path = self.folder / self._entry.files[number].name
            with reading_tensors(path, _REMEDY), path.open("rb") as file:
                tensors = TensorFile(file, 0, self._entry.files[number].bytes)
                for position, place in enumerate(places):
                    if self._files[place] == number:
                        rows[position] = self._row(tensors, place)
        return rows

    def _row(self, tensors: TensorFile, place: int) -> TextRow:
        row, stored = int(self._rows[place]), {name: tensors[name] for name in tensors.names}
        texts = stored.pop(TEXT) if _END in stored else None
        if any(not row < tensor.shape[0] for tensor in stored.values()) or (
            stored.pop(_KEY)[row].read().item() != self._keys[place]
        ):
            raise ValueError(f"its row {row} is missing, or another prompt's")
        if texts is None:
            return {name: tensor[row].read() for name, tensor in stored.items()}
        ends = stored.pop(_END)
        begin, end = (int(ends[row - 1].read()) if row else 0), int(ends[row].read())
        if not 0 <= begin < end <= texts.shape[0]:
            raise ValueError(f"the text of its row {row} lies at {begin} to {end} of {texts.shape[0]}")
        text = texts[begin:end].read()
        return {TEXT: text, MASK: torch.ones(len(text), dtype=torch.bool)} | {
            name: tensor[row].read() for name, tensor in stored.items()
        }

    def _place(self, prompt: str) -> int:
        (place,) = self.find([prompt])
        if place < 0:
            raise UserError(f"{self.folder} lacks the prompt {prompt[:80]!r}: it differs from the tars; {_REMEDY}")
        return int(place)


def verify_text(folder: AnyPath, entry: TextFile | StoredFile) -> None:
    """Check a file's size and SHA-256 against the manifest.

    Raises:
        UserError: it is missing, truncated or altered.
    """
    _verify(folder / entry.name, entry)


def _verify(path: AnyPath, entry: TextFile | StoredFile) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; the manifest lists it; {_REMEDY}")
    size = path.stat().st_size
    if size != entry.bytes:
        raise UserError(f"{path} has {size} bytes, the manifest says {entry.bytes}: truncated or replaced; {_REMEDY}")
    if sha256_file(path) != entry.sha256:
        raise UserError(f"{path} differs from the SHA-256 in the manifest: damaged or replaced; {_REMEDY}")


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _file_layout(prompts: int, row: TextRow, length: int) -> Layout:
    """Return the layout of a file of ``prompts`` rows like ``row``, ``length`` tokens in all."""
    tensors = {name: (value.dtype, (prompts, *value.shape)) for name, value in row.items() if name != MASK}
    if MASK in row:
        tensors[TEXT] = (row[TEXT].dtype, (length, *row[TEXT].shape[1:]))
        tensors[_END] = (torch.int64, (prompts,))
    return {_KEY: (torch.int64, (prompts,)), **tensors}


def _index_layout(prompts: int) -> Layout:
    return {name: (dtype, (prompts,)) for name, dtype in _INDEX_COLUMNS.items()}


def _columns(prompts: Sequence[str], rows: Sequence[TextRow]) -> Iterator[TextRow]:
    """Yield what each prompt adds to every tensor of the file."""
    end = 0
    for key, row in zip(torch.from_numpy(prompt_keys(prompts).copy()), rows, strict=True):
        end += len(row[TEXT])
        added = {name: value[None] for name, value in row.items()} | {_KEY: key[None], _END: torch.tensor([end])}
        yield added | ({TEXT: row[TEXT]} if MASK in row else {})
