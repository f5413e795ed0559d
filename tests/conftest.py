"""Settings for all tests."""

from __future__ import annotations

import os

import pytest

# Tiny models run fastest on one thread; several busy test processes on two cores would otherwise stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Actors share the cores of their machine out; in the tests' own process they must not."""
    monkeypatch.setattr("torch.set_num_threads", lambda _number: None)
