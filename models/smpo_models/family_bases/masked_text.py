"""Text whose padding the denoiser does not see.

Shape suffixes: N prompts, B batch, L D a text embedding.
"""

from __future__ import annotations

import torch

from smpo_schemas.shards.text_rows import MASK, TEXT, stack_rows


def without_padding(states_NLD: torch.Tensor, mask_NL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return padded embeddings in the form of :meth:`smpo_models.family.Family.encode_text`.

    Args:
        states_NLD: output of a text encoder.
        mask_NL: bool, True for tokens that are not padding.
    """
    return stack_rows(
        [{TEXT: states[mask], MASK: mask[mask]} for states, mask in zip(states_NLD, mask_NL, strict=True)]
    )


def rows(text_BLD: torch.Tensor, mask_BL: torch.Tensor | None) -> list[torch.Tensor]:
    """Return each row without its padding: B tensors [L, D]; without a mask there is no padding.

    On the meta device, where the mask has no values, rows keep their padding.
    """
    if mask_BL is None or mask_BL.is_meta:
        return list(text_BLD)
    lengths = mask_BL.sum(1).tolist()
    return [row[:length] for row, length in zip(text_BLD, lengths, strict=True)]
