"""Start Ray, and set the device and arithmetic of its workers."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from rich.console import Console

from smpo_common.errors import UserError
from smpo_common.retry import TRANSIENT_ERRNOS
from smpo_models.devices import choose_device, device_in_words
from smpo_pipeline.jobs.cluster.pools import cluster_gpus

_DEATHS_LOADING = 5
"""Deaths in a row of actors that load their model, after which the job ends."""

RETRIES = 5
"""Retries of a task that storage fails, with pauses that double."""

_SOCKET_PATH = 103
"""Longest path of a socket in bytes, on macOS; Linux takes four more."""

_SOCKET = "/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store"
"""Ray's longest socket path, below the directory for temporary files."""

_LOGICAL_CPUS = 4
"""Least CPU slots of a local Ray: CPU stages must not wait for a slot that the actors hold."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to the Ray cluster at ``address``, or start a local one that ends with the block.

    Raises:
        UserError: no cluster answers at ``address``, or Ray cannot start.
    """
    # The driver's progress bar says what users need; Ray's log lines would break it up.
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray Data logs errors that it also raises.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        options["address"] = address
    else:
        # Without an address Ray would join any cluster that runs on this machine.
        options |= {"address": "local", "num_cpus": max(_LOGICAL_CPUS, os.cpu_count() or 1), "include_dashboard": False}
        # By default Ray writes a token into the home directory, which may not be writable.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= _short_directory()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _native_stderr_silenced():
            ray.init(**options)
    except Exception as error:
        # Ray raises a plain Exception where its processes do not start in time, as on a machine with too much to do.
        if not isinstance(error, (ConnectionError, ValueError)) and type(error) is not Exception:
            raise
        where = f"--ray-address {address}" if address else "Ray cannot start on this machine"
        raise UserError(f"{where}: {error}") from error
    except SystemExit as ended:
        # Ray exits so at a SIGTERM while it starts.
        raise SystemExit(128 + signal.SIGTERM) from ended
    # Ray's own handler prints native frames and aborts.
    signal.signal(signal.SIGTERM, terminate)
    _configure_ray_data()
    try:
        with warnings.catch_warnings():
            # Ray Data warns that a small input has work for fewer actors than there are.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data")
            yield
    finally:
        ray.shutdown()


def _configure_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Each row is a unit or chunk of our own size, to be passed on as soon as it is ready.
    context.target_max_block_size = 1
    # Never shrink a pool for lack of work: loading a model again takes longer.
    context.autoscaling_config.actor_pool_util_downscaling_threshold = -1
    # By default one actor that dies while it loads its model ends the job.
    context.max_consecutive_actor_init_deaths = _DEATHS_LOADING
    # By default no error is retried. Tasks are deterministic, so that a retry yields the same rows.
    context.retried_map_errors = [os.strerror(number) for number in TRANSIENT_ERRNOS]
    context.max_map_retries = RETRIES
    # Ray's replacement of an exception loses its cause when it comes from an actor with threads.
    context.raise_original_map_exception = True


def _short_directory() -> dict[str, str]:
    """Move a local Ray's sockets to /tmp if their paths would be too long below TMPDIR; objects stay in TMPDIR."""
    directory = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(directory + _SOCKET)) <= _SOCKET_PATH:
        return {}
    return {"_temp_dir": "/tmp/ray", "object_spilling_directory": directory}  # noqa: S108  (Ray's default)


@contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    """Send the process's stderr to /dev/null: Ray's native library writes its log level there, whatever it is."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def set_reproducible_arithmetic(device: str) -> None:
    """Make a worker's results depend on its inputs alone, as far as the device can.

    On CPU: one thread, whatever the machine has, since torch sums in another order with several threads. On a GPU: no
    TF32, to which cuDNN rounds the inputs of convolutions by default.
    """
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":
        torch.set_num_threads(1)


def resolve_device(device: str | None, address: str | None = None) -> str:
    """Choose and print the device: the given one, else a GPU if there is one.

    Args:
        device: cpu, cuda or None.
        address: of the cluster whose GPUs count; None: those of this machine.

    Raises:
        UserError: the device does not exist; no cluster answers; or this machine has a GPU that torch cannot use and
            the CPU was not asked for.
    """
    if address is None:
        chosen = choose_device(device)
        where = device_in_words(chosen)
    elif device is not None:
        chosen = where = device
    else:
        with connected(address):
            num_gpus = cluster_gpus()
        chosen = "cuda" if num_gpus else "cpu"
        where = f"{chosen} (the cluster has {num_gpus} GPUs)"
    Console(highlight=False).print(f"device: {where}", soft_wrap=True)
    return chosen
