"""All randomness of a trajectory, from (seed, pair_id, trajectory) alone.

Results then depend neither on batch size nor on worker count nor on order. Each purpose has its own stream, so that
switching one draw off never shifts another.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def generator(seed: int, pair_id: str, trajectory: int, purpose: str) -> np.random.Generator:
    """The stream for one purpose of one trajectory: counter-based (Philox), keyed by a hash."""
    digest = hashlib.sha256(f"{seed}/{trajectory}/{purpose}/{pair_id}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def gaussian(stream: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 of this shape, on the CPU whatever the device, so that devices agree."""
    return torch.from_numpy(stream.standard_normal(shape, dtype=np.float32))
