"""Whether memory ran out, by what the libraries raise."""

from __future__ import annotations

import re

_WORDS = re.compile("out of memory|MemoryError|ALLOC_FAILED|can't allocate memory", re.IGNORECASE)


def says_out_of_memory(text: str) -> bool:
    """Whether an error's words mean that memory ran out."""
    return bool(_WORDS.search(text))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a device's or the machine's: CUDA's libraries say so in plain RuntimeErrors."""
    return says_out_of_memory(f"{type(error).__name__}: {error}")
