"""Text whose padding the denoiser does not see.

Shape suffixes: N prompts, B batch, L D a text embedding.
"""

from __future__ import annotations

import torch

from smpo_schemas.shards.text_rows import MASK, TEXT, stack_rows


def without_padding(states_NLD: torch.Tensor, mask_NL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what :meth:`smpo_models.family.Family.encode_text` gives of padded embeddings.

    Args:
        states_NLD: of a text encoder.
        mask_NL: of the tokens that are no padding; bool.
    """
    return stack_rows(
        [{TEXT: states[mask], MASK: mask[mask]} for states, mask in zip(states_NLD, mask_NL, strict=True)]
    )


def rows(text_BLD: torch.Tensor, mask_BL: torch.Tensor) -> list[torch.Tensor]:
    """Return each row without its padding: B tensors [L, D].

    On the meta device, where nothing is known of the mask, rows keep their padding.
    """
    lengths = [text_BLD.shape[1]] * len(text_BLD) if mask_BL.is_meta else mask_BL.sum(1).tolist()
    return [row[:length] for row, length in zip(text_BLD, lengths, strict=True)]
