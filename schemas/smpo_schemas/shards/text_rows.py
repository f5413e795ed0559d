"""Embeddings of single prompts, and of several as one batch.

Shape suffixes: N prompts, L D a text embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch.nn.utils.rnn import pad_sequence

TextRow = Mapping[str, torch.Tensor]
"""The outputs of the text encoders for one prompt, by the model family's names; ``text`` is [L, D]. Where L depends on
the prompt, there is ``mask``, bool [L], all True."""

TEXT = "text"
MASK = "mask"


def stack_rows(rows: Sequence[TextRow]) -> dict[str, torch.Tensor]:
    """Stack N rows: tensors [N, ...], in the widest of their dtypes.

    Texts of different lengths end in zeros, where the mask is False.
    """
    names = rows[0].keys()
    return {name: _stack([row[name] for row in rows], pads=MASK in names and name in (TEXT, MASK)) for name in names}


def split_rows(batch: Mapping[str, torch.Tensor]) -> list[TextRow]:
    """Return the rows of a batch, without padding: the inverse of :func:`stack_rows`."""
    rows: list[dict[str, torch.Tensor]] = [
        {name: value[number] for name, value in batch.items()} for number in range(len(batch[TEXT]))
    ]
    for row in rows:
        if MASK in row:
            length = int(row[MASK].sum())
            row |= {name: row[name][:length] for name in (TEXT, MASK)}
    return list(rows)


def _stack(values: Sequence[torch.Tensor], *, pads: bool) -> torch.Tensor:
    dtype = reduce(torch.promote_types, (value.dtype for value in values))
    cast = [value.to(dtype) for value in values]
    return pad_sequence(cast, batch_first=True) if pads else torch.stack(cast)
