"""A file of encoded prompts, so that the text encoders can be freed (``--text cache``).

It is a safetensors file with ``key``, int64 [N], the hashes of the prompts in increasing order, and the outputs of the
text encoders, [N, ...] each. Rows are read from the mapped file. Its name is a hash of model, shards and dtype.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from smpo_common.errors import UserError
from smpo_common.files import atomic_path, sha256_json
from smpo_models.family import Family
from smpo_trainer.monitoring.console import RunConsole
from smpo_trainer.settings import Dtype, TrainSettings
from smpo_trainer.shards.shard_set import ShardSet

_KEY = "key"
_BATCH = 64
"""Prompts per forward of the encoders."""

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Storage dtype by the run's dtype. Autocast rounds to it before the first use anyway, so no bit of a step changes."""

_NAMES = {torch.int64: "I64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Names of dtypes in safetensors."""

_TITLE = "encoding all prompts once"


class CachedText:
    """Replaces :meth:`smpo_models.family.Family.encode_text` by look-ups in a file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Open a file of :func:`cache_text`; tensors are returned on ``device``.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it, the next run makes it again") from error
        self._path, self._device = path, device
        self._key_N = tensors.pop(_KEY).numpy()
        self._tensors = tensors

    def __call__(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Look up the encodings of B prompts.

        Raises:
            UserError: the file lacks a prompt.
        """
        key_B = _keys(prompts)
        rows = np.searchsorted(self._key_N, key_B).clip(max=len(self._key_N) - 1)
        for prompt, is_present in zip(prompts, self._key_N[rows] == key_B, strict=True):
            if not is_present:
                raise UserError(f"{self._path} lacks the prompt {prompt!r}: index and tars of the shards differ")
        return {name: value[rows].to(self._device) for name, value in self._tensors.items()}


def cache_text(settings: TrainSettings, shards: ShardSet, family: Family, console: RunConsole) -> Path:
    """Encode the prompts of a data set into a file, unless it exists, and return the file.

    The first process of a machine encodes, the others wait for its lock.

    Raises:
        UserError: the file cannot be written.
    """
    dtype = _DTYPES[settings.compute.chosen_dtype]
    made_from = {
        "model": settings.model,
        "text": shards.model.text,
        "shards": shards.manifest_hashes(),
        "dtype": str(dtype),
    }
    path = settings.data.cache_folder / f"text-{sha256_json(made_from)[:16]}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                prompts = {
                    "" if trajectory.meta.prompt_dropped else trajectory.meta.prompt
                    for _, trajectory in shards.trajectories()
                }
                with console.bar(_TITLE, -(-len(prompts) // _BATCH)) as done:
                    _write(path, prompts, family, dtype, done)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _keys(prompts: Iterable[str]) -> np.ndarray:
    """Hash each prompt to int64."""
    digests = [hashlib.sha256(prompt.encode()).digest()[:8] for prompt in prompts]
    return np.frombuffer(b"".join(digests), dtype=np.int64)


def _write(path: Path, prompts: set[str], family: Family, dtype: torch.dtype, done: Callable[[], None]) -> None:
    unsorted = list(prompts)
    key_N = _keys(unsorted)
    # Sorted, for a binary search in the mapped file.
    order = np.argsort(key_N)
    key_N = key_N[order]
    if (np.diff(key_N) == 0).any():
        raise UserError("two prompts have the same hash; use --text live")
    batches = _encoded([unsorted[index] for index in order], family, dtype)
    # safetensors can only write tensors that are in memory as a whole: write batch by batch instead.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        first = next(batches)
        tensors = {_KEY: torch.from_numpy(key_N), **first}
        offsets, header = _header(tensors, len(prompts))
        file.write(header)
        file.seek(len(header) + offsets[_KEY])
        file.write(key_N.tobytes())
        start = 0
        batch: dict[str, torch.Tensor] | None = first
        while batch is not None:
            for name, value in batch.items():
                rows = value.contiguous().view(torch.uint8).reshape(len(value), -1).numpy()
                file.seek(len(header) + offsets[name] + start * rows.shape[1])
                file.write(rows.data)
            start += len(rows)
            done()
            batch = next(batches, None)


def _encoded(prompts: Sequence[str], family: Family, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Encode the prompts batch by batch; tensors are on the CPU."""
    for start in range(0, len(prompts), _BATCH):
        text = family.encode_text(prompts[start : start + _BATCH])
        yield {name: value.to("cpu", dtype) for name, value in text.items()}


def _header(tensors: dict[str, torch.Tensor], count: int) -> tuple[dict[str, int], bytes]:
    """Lay out a safetensors file (length, JSON, data) of ``count`` rows like those of ``tensors``.

    Returns:
        The offset of each tensor's data after the header, and the header.
    """
    described, offsets, end = {}, {}, 0
    for name, value in tensors.items():
        offsets[name] = end
        end += count * value[0].numel() * value.element_size()
        shape = [count, *value.shape[1:]]
        described[name] = {"dtype": _NAMES[value.dtype], "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return offsets, len(text).to_bytes(8, "little") + text
