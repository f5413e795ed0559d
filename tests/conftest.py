"""Settings for all tests."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.command import run_command, run_here

# Tiny models run fastest on one thread; several busy test processes on two cores would otherwise stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Of every Ray that this process starts; what connects to the shared one has it too.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# By default Ray's workers are niced: beside other test processes on two cores they hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")

ON_ONE_RAY = {
    "tests/jobs/faults/test_failures.py",
    "tests/jobs/invert/test_buckets.py",
    "tests/jobs/ray/test_session.py",
    "tests/jobs/test_jobs.py",
    "tests/jobs/test_object_store.py",
    "tests/planning/test_command.py",
    "tests/rewards/test_through_score.py",
}
"""Files with tests on the shared Ray: one process of pytest-xdist runs them all, so that there is only one."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Run a file's tests in one process, and so those of all files in :data:`ON_ONE_RAY`."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ray" if file in ON_ONE_RAY else file

    return OneRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files on the shared Ray come first, then others that take minutes: at the end no process waits for another's.

    pytest-xdist would put those with the most tests first; ``--no-loadscope-reorder`` in the Makefile keeps this order.
    """
    files = {item: item.nodeid.partition("::")[0] for item in items}
    on_ray = {files[item] for item in items if "ray_address" in getattr(item, "fixturenames", ())}
    if missing := on_ray - ON_ONE_RAY:
        raise pytest.UsageError(f"tests/conftest.py: ON_ONE_RAY lacks {', '.join(sorted(missing))}")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (files[item] not in ON_ONE_RAY, item.path not in slow))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Actors share the cores of their machine out; in the tests' own process they must not."""
    monkeypatch.setattr("torch.set_num_threads", lambda _number: None)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One Ray for the jobs of all tests in :data:`ON_ONE_RAY`: each start of one is 10 s of CPU.

    Its workers have a command's working directory but not its environment, and outlive the command: what is about
    Ray's start, killed commands or workers' environment keeps a Ray of its own.
    """
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 1 << 30, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def on_ray(ray_address: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """:func:`run_command` for jobs, on that Ray."""
    return lambda *command, **more: run_command(*command, "--ray-address", ray_address, **more)


@pytest.fixture
def here_on_ray(ray_address: str, capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """:func:`run_here` for jobs, on that Ray."""
    return lambda *command: run_here(capfd, *command, "--ray-address", ray_address)
