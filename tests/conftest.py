"""Settings for all tests."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import run_command, run_here
from tests.forking import forking_python

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_OF_RAY = {"ray_address", "on_ray", "here_on_ray"}
_ON_RAY = pytest.StashKey[set[Path]]()
_RAY: list[Any] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files on Ray come first, then others with slow tests: at the end no process waits for another's long file.

    Of the rest, the trainer's come first and the commands' last. ``--no-loadscope-reorder`` in the Makefile keeps this
    order; else pytest-xdist puts those with the most tests first.
    """
    on_ray = {item.path for item in items if _OF_RAY & set(getattr(item, "fixturenames", ()))}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    last = {path: -number for number, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (item.path not in on_ray, item.path not in slow, last[item.path]))
    config.stash[_ON_RAY] = on_ray


def pytest_collection_finish() -> None:
    """Spare the garbage collector the libraries' objects: it took an eighth of the tests' time to look at them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End Ray after the last file on it: its services take CPU while they wait."""
    if _RAY and (nextitem is None or nextitem.path not in item.config.stash[_ON_RAY]):
        _RAY.pop().shutdown()


def _ray_address() -> str:
    """Start one Ray for the jobs of all tests of this process: each start of one is 10 s of CPU.

    Its workers have a command's working directory but not its environment, and outlive the command: what is about
    Ray's start, killed commands or workers' environment keeps a Ray of its own.
    """
    if not _RAY:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 2, "object_store_memory": 1 << 30, "include_dashboard": False}
        node |= {"include_log_monitor": False, "no_monitor": True}  # of no use here; the first is never idle
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
            patch.setattr("sys.executable", forking_python())  # each worker would import torch and more
            _RAY.append(Cluster(initialize_head=True, head_node_args=node))
    return _RAY[0].address


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Actors share the cores of their machine out; in the tests' own process they must not."""
    monkeypatch.setattr("torch.set_num_threads", lambda _number: None)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Reset accelerate's process-wide state, which a training in this process leaves behind."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window; see :func:`tests.browsers.open_browser`."""
    from tests.browsers import open_browser

    yield from open_browser()


@pytest.fixture
def ray_address() -> str:
    """Address of the Ray that the tests of this process share."""
    return _ray_address()


@pytest.fixture(scope="session")
def on_ray() -> Callable[..., subprocess.CompletedProcess[str]]:
    """:func:`run_command` for jobs, on that Ray."""
    return lambda *command, **more: run_command(*command, "--ray-address", _ray_address(), **more)


@pytest.fixture
def here_on_ray(capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """:func:`run_here` for jobs, on that Ray."""
    return lambda *command: run_here(capfd, *command, "--ray-address", _ray_address())
