"""Assign prompts to folds."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from smpo_common.errors import UserError


def split_by_prompt(prompts: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Assign each row to a fold: int [P], 0 to ``folds`` - 1. All rows of a prompt are in one fold.

    Prompts are ordered by a hash of (seed, prompt), and each goes into the fold with the fewest rows so far. The folds
    do not depend on the order of the rows, and no fold is empty.

    Raises:
        UserError: there are fewer prompts than folds.
    """
    counts = Counter(prompts)
    if len(counts) < folds:
        raise UserError(
            f"--folds {folds} needs at least {folds} prompts that can be used, since all pairs of a prompt are in one "
            f"fold; there are {len(counts)}"
        )
    sizes = [0] * folds
    fold_of: dict[str, int] = {}
    for prompt in sorted(counts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest()):
        fold = sizes.index(min(sizes))
        fold_of[prompt] = fold
        sizes[fold] += counts[prompt]
    return np.array([fold_of[prompt] for prompt in prompts], dtype=np.int64)
