"""The distinct prompts of the pairs, and their embeddings, as ``--text stored`` stores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, groupby

import torch

from smpo_common.errors import UserError
from smpo_common.files import read_all
from smpo_models.family import Family
from smpo_pipeline.jobs.reading import Layouts
from smpo_schemas.pairs import RowRange, read_prompts
from smpo_schemas.shards.text import TEXT_DTYPES
from smpo_schemas.shards.text_rows import TextRow, split_rows

PROMPTS_PER_FILE = 128
"""Prompts of a file, which is a unit: 0.5 GB for FLUX.1 in half precision, 15 MB for SD 1.5."""

_BATCH = 16
"""Prompts per forward of the encoders; fixed, so that the bytes do not depend on a flag."""


def distinct_prompts(ranges: Sequence[RowRange], layouts: Layouts) -> list[str]:
    """Read the prompts of input rows: each distinct one once, the empty one first, then by first occurrence.

    Raises:
        UserError: a file cannot be read.
    """
    # A file at a time: a row group can only be read from its start, whichever unit's rows are wanted.
    files = [list(parts) for _, parts in groupby(ranges, key=lambda rows: rows.path)]
    whole = [replace(parts[0], stop=parts[-1].stop) for parts in files]
    prompts = read_all(lambda rows: list(dict.fromkeys(read_prompts(rows, layouts[rows.path]))), whole)
    return list(dict.fromkeys(["", *chain.from_iterable(prompts)]))


def encode_batches(family: Family, prompts: Sequence[str], dtype: str) -> Iterator[list[TextRow]]:
    """Encode prompts, batch by batch: their rows on the CPU, rounded to what is stored for this ``--dtype``.

    Raises:
        UserError: an embedding is not finite.
    """
    for start in range(0, len(prompts), _BATCH):
        encoded = family.encode_text(prompts[start : start + _BATCH])
        yield split_rows({name: _rounded(value, TEXT_DTYPES[dtype]) for name, value in encoded.items()})


def _rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not value.is_floating_point():
        return value.cpu()
    rounded = value.to("cpu", dtype)
    if not rounded.isfinite().all():
        # Inner states of language models may be beyond the range of float16.
        raise UserError(
            f"an embedding of a prompt is not finite in {str(dtype).removeprefix('torch.')}; use --dtype bf16"
        )
    return rounded
