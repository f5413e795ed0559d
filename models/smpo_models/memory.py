"""Recognise that memory ran out, by the errors that the libraries raise."""

from __future__ import annotations

import re

_WORDS = re.compile(
    "out of memory|MemoryError|ALLOC(ATION)?_FAILED|can't allocate memory"
    # What cuDNN and cuBLAS say on a nearly full GPU, which has no room for a kernel's workspace or for a handle.
    "|unable to find an engine|No valid execution plans|CUBLAS_STATUS_NOT_INITIALIZED",
    re.IGNORECASE,
)


def says_out_of_memory(text: str) -> bool:
    """Whether an error's words mean that memory ran out."""
    return bool(_WORDS.search(text))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host: CUDA's libraries say so in plain RuntimeErrors."""
    return says_out_of_memory(f"{type(error).__name__}: {error}")
