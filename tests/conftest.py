"""Settings for all tests."""

from __future__ import annotations

import os

import pytest

# Tiny models run fastest on one thread; several busy test processes on two cores would otherwise stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need Ray or minutes come first: at the end no process waits for another's long file.

    pytest-xdist would put those with the most tests first; ``--no-loadscope-reorder`` in the Makefile keeps this order.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Actors share the cores of their machine out; in the tests' own process they must not."""
    monkeypatch.setattr("torch.set_num_threads", lambda _number: None)
