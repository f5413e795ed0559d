"""Starting Ray, and the device and arithmetic of its workers."""

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
from smpo_pipeline.jobs.ray.pools import gpus_there

_DEATHS_LOADING = 5

RETRIES = 5

_SOCKET_PATH = 103
"""Bytes of a socket's path: of macOS; Linux takes four more."""

_SOCKET = "/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store"
"""The longest, below the directory for temporary files."""

_LOGICAL_CPUS = 4
"""At least this many on a local Ray: CPU stages must not wait for a slot that the actors hold."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A Ray session: the cluster at ``address``, or a local one that ends with the block.

    Raises:
        UserError: no cluster answers at ``address``.
    """
    # The driver's progress bar says what users need; Ray's own log lines would tear it apart.
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Its errors come as exceptions too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        options["address"] = address
    else:
        # By name: without one Ray joins a cluster that happens to run on this machine.
        options |= {"address": "local", "num_cpus": max(_LOGICAL_CPUS, os.cpu_count() or 1), "include_dashboard": False}
        # By default Ray writes one into the home directory, which may not be writable.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= _short_directory()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        with _native_stderr_silenced():
            ray.init(**options)
    except (ConnectionError, ValueError) as error:
        where = f"--ray-address {address}" if address else "Ray cannot start here"
        raise UserError(f"{where}: {error}") from error
    except SystemExit as ended:
        # What Ray does at SIGTERM while it starts.
        raise SystemExit(128 + signal.SIGTERM) from ended
    # Ray's own prints native frames and aborts.
    signal.signal(signal.SIGTERM, terminate)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A row is a piece of work that we cut ourselves: each one travels on as soon as it is there.
    context.target_max_block_size = 1
    # Loading a model takes longer than any lack of work: pools grow, and shrink, with the cluster alone.
    context.autoscaling_config.actor_pool_util_downscaling_threshold = -1
    # A worker that dies later is started again without limit; by default one that dies while it loads ends the job.
    context.max_consecutive_actor_init_deaths = _DEATHS_LOADING
    # With pauses that double. A unit's task gives the same from its start on, as this asks for.
    context.retried_map_errors = [os.strerror(number) for number in TRANSIENT_ERRNOS]
    context.max_map_retries = RETRIES
    # What Ray would put in its place loses its cause on the way from an actor with threads.
    context.raise_original_map_exception = True
    try:
        with warnings.catch_warnings():
            # That a small input has work for fewer actors than there are.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"ray\.data")
            yield
    finally:
        ray.shutdown()


def _short_directory() -> dict[str, str]:
    """Where a local Ray keeps its sockets where their paths would be too long at TMPDIR; objects stay there."""
    there = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(there + _SOCKET)) <= _SOCKET_PATH:
        return {}
    return {"_temp_dir": "/tmp/ray", "object_spilling_directory": there}  # noqa: S108  (Ray's own where TMPDIR is unset)


@contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    """Ray's native library announces its log level on the process's stderr whatever that level is."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def plain_arithmetic(device: str) -> None:
    """Inside a worker: compute what depends on the inputs alone, as far as the device can.

    On CPU on one core, whatever there is, since torch sums otherwise by several threads. On a GPU, float32 is float32:
    by default cuDNN rounds what it convolves to TF32's 10 bits.
    """
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":
        torch.set_num_threads(1)


def check_device(device: str | None, address: str | None = None) -> str:
    """The device to use, which is printed: the given one, else a GPU where there is one.

    Args:
        device: as given.
        address: of the cluster whose GPUs count; None: those of this machine.

    Raises:
        UserError: neither ``cpu`` nor ``cuda``, or one that is not to be had; or no cluster answers; or nobody asked
            for the CPU of a machine with a GPU.
    """
    if address is None:
        chosen = choose_device(device)
        where = device_in_words(chosen)
    elif device in ("cpu", "cuda"):
        chosen = where = device
    elif device is None:
        with connected(address):
            there = gpus_there()
        chosen = "cuda" if there else "cpu"
        where = f"{chosen} (the cluster has {there} GPUs)"
    else:
        raise UserError(f"--device {device}: cpu or cuda")
    Console(highlight=False).print(f"device: {where}", soft_wrap=True)
    return chosen
