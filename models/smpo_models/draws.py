"""Random draws that depend on their name alone, not on batch size, worker count, order or device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def named_stream(name: str) -> np.random.Generator:
    """Return a counter-based stream (Philox), keyed by the first 16 bytes of the name's SHA-256."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def trajectory_stream(seed: int, pair_id: str, trajectory: int, purpose: str) -> np.random.Generator:
    """Return the stream for one purpose of one trajectory, so that a draw that is switched off shifts no other."""
    return named_stream(f"{seed}/{trajectory}/{purpose}/{pair_id}")


def gaussian(stream: np.random.Generator, shape: Sequence[int]) -> torch.Tensor:
    """Draw standard normal float32 values of this shape, on the CPU so that all devices get the same."""
    return torch.from_numpy(stream.standard_normal(tuple(shape), dtype=np.float32))


def torch_generator(name: str) -> torch.Generator:
    """Return a torch generator on the CPU, seeded by :func:`named_stream`."""
    return torch.Generator().manual_seed(int(named_stream(name).integers(2**63)))


def image_noise(seed: int, prompt: str, index: int, shape: Sequence[int]) -> torch.Tensor:
    """Draw the initial noise of image ``index`` of a prompt; every model starts that image from the same noise."""
    return gaussian(named_stream(f"{seed}\n{index}\n{prompt}"), shape)
