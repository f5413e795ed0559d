"""Whether memory ran out, by what the libraries raise."""

from __future__ import annotations

import re

_WORDS = re.compile(
    "out of memory|MemoryError|ALLOC(ATION)?_FAILED|can't allocate memory"
    # What cuDNN and cuBLAS say near a full card, which holds no workspace for any of their kernels, and no handle.
    "|unable to find an engine|No valid execution plans|CUBLAS_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)


def says_out_of_memory(text: str) -> bool:
    """Whether an error's words mean that memory ran out."""
    return bool(_WORDS.search(text))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the machine's: CUDA's libraries say so in plain RuntimeErrors."""
    return says_out_of_memory(f"{type(error).__name__}: {error}")
