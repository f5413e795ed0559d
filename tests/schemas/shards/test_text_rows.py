"""Rows of text and batches of them."""

from __future__ import annotations

import torch

from smpo_schemas.shards.text_rows import split_rows, stack_rows


def test_texts_of_different_lengths_end_in_zeros_where_the_mask_is_false() -> None:
    rows = [
        {"text": torch.ones(length, 2), "mask": torch.ones(length, dtype=torch.bool), "pooled": torch.zeros(3)}
        for length in (1, 3)
    ]
    batch = stack_rows(rows)
    assert batch["text"].tolist() == [[[1, 1], [0, 0], [0, 0]], [[1, 1], [1, 1], [1, 1]]]
    assert batch["mask"].tolist() == [[True, False, False], [True, True, True]]
    assert batch["pooled"].shape == (2, 3)
    for found, row in zip(split_rows(batch), rows, strict=True):
        assert all(torch.equal(found[name], value) for name, value in row.items())


def test_rows_are_stacked_in_the_widest_of_their_types() -> None:
    """Directories may differ in ``--dtype``."""
    rows = [{"text": torch.ones(2, 2, dtype=dtype)} for dtype in (torch.bfloat16, torch.float32)]
    assert stack_rows(rows)["text"].dtype == torch.float32
