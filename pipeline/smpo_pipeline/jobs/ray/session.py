"""Starting Ray, and running units through it with progress and one-line errors."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from smpo_common.errors import UserError
from smpo_common.retry import PASSING_ERRNOS
from smpo_models.devices import choose_device, device_in_words
from smpo_pipeline.jobs.faults.ledger import SharedLedger
from smpo_pipeline.jobs.record.progress import Pace, job_progress, shown_under_way
from smpo_pipeline.jobs.record.reject_rate import RejectRate
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord

Build = Callable[[ray.data.Dataset, SharedLedger], ray.data.Dataset]
"""Adds a job's stages to a dataset of rows {"unit": number}; the ledger is for their workers."""

Collect = Callable[[pa.Table], Iterable[UnitRecord]]
"""Takes what the last stage yields, on the driver; returns the records of the units that are committed with it."""

_ACTOR_CPUS = 0.01
_ROUNDING = 1e-6
_DEATHS_LOADING = 5
_RETRIES = 5
_MODELS_MEMORY = 3
"""Memory of an actor on CPU, over its model's weights."""

_TASK_BYTES = 300 << 20
"""Of a task that decodes, over the pixels that it gives: libraries, the files that it reads, the decoder's process."""

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
        raise UserError(f"--ray-address {address}: {error}") from error
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
    context.retried_map_errors = [os.strerror(number) for number in PASSING_ERRNOS]
    context.max_map_retries = _RETRIES
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


@dataclass(frozen=True)
class Pool:
    """The model actors of one stage.

    Attributes:
        size: how many; at the most, where ``room`` is given.
        num_gpus: share of a GPU that each asks for; 0 on cpu.
        threads: calls that each works on at once.
        room: for how many there is room now; further ones are started when there is more. None: the pool is fixed, as
            it must be where several stages share GPUs, which Ray would share out by halves.
    """

    size: int
    num_gpus: float
    threads: int = 1
    room: int | None = None

    def options(self) -> dict[str, Any]:
        """What Ray Data is told.

        CPU slots are a tiny part: an actor's thread is one core's (:func:`plain_arithmetic`), it must leave slots for
        decoding, and Ray Data fuses neighbouring stages of equal demands: decoding would wait for the model.
        """
        compute = ray.data.ActorPoolStrategy(
            min_size=1 if self.room else self.size,
            max_size=self.size,
            initial_size=min(self.size, self.room or self.size),
            enable_true_multi_threading=self.threads > 1,
            max_concurrent_calls_per_actor=self.threads if self.threads > 1 else None,
        )
        return {"compute": compute, "num_gpus": self.num_gpus, "num_cpus": _ACTOR_CPUS}


def gpus_there() -> int:
    """GPUs of the cluster that is connected to."""
    return int(ray.cluster_resources().get("GPU", 0))


def cores_there(address: str | None) -> list[int]:
    """Cores of each machine of the cluster at ``address`` that works, or of this one; at least one in all."""
    if not address:  # Ray is told of more than there are
        return [os.cpu_count() or 1]
    cores = (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return [each for each in cores if each] or [1]


def share_gpus(wanted: Mapping[str, tuple[int, float]], there: int) -> dict[str, float]:
    """Share GPUs out between the stages of a job, which all run at once: one that waited would wait forever.

    Args:
        wanted: for each stage its number of actors and the least share of a GPU that one needs.
        there: GPUs of the cluster.

    Returns:
        For each stage the share that each of its actors asks for, largest first: what it needs, and its part of what
        is left over, so that actors do not crowd on one GPU while another is idle.

    Raises:
        UserError: not even the least shares fit.
    """
    largest_first = sorted(wanted.items(), key=lambda item: -item[1][1])
    free = [1.0] * there
    for _, (size, least) in largest_first:
        for _ in range(size):
            found = next((gpu for gpu, room in enumerate(free) if room >= least - _ROUNDING), None)
            if found is None:
                parts = ", ".join(f"{name} {size} x {least:g}" for name, (size, least) in wanted.items())
                raise UserError(
                    f"--device cuda: Ray sees {there} GPUs, too few for the actors ({parts}); use fewer "
                    "(--concurrency), or score one reward after another into the same --out"
                )
            free[found] -= least
    on_one = sum(math.ceil(size / there) * least for size, least in wanted.values())
    scale = max(1.0, 1 / on_one)
    # Ray counts in ten-thousandths; rounding up could ask for more than there is.
    return {name: math.floor(least * scale * 1e4 + _ROUNDING) / 1e4 for name, (_, least) in largest_first}


def limit_memory(dataset: ray.data.Dataset, limit: int) -> None:
    """Let a job keep at most ``limit`` bytes in Ray's object store: stages wait rather than run ahead of a slow one."""
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=limit)


def task_memory(unit_bytes: int) -> int:
    """Bytes of a node that a task asks for which decodes a unit of so many.

    Raises:
        UserError: no node has them, for which Ray would wait in silence.
    """
    wanted = _TASK_BYTES + unit_bytes
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    if wanted > most:
        raise UserError(
            f"a unit of work is {unit_bytes / 1e9:.1f} GB of decoded pixels, more than any node has memory for "
            f"({most / 1e9:.1f} GB by Ray's count): use a smaller --pairs-per-shard or --shard-size"
        )
    return wanted


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


def model_pool(device: str, concurrency: int | None, address: str | None, weights: int, units: int) -> Pool:
    """Actors of one GPU each, or of one core each; says so where there are fewer GPUs than actors.

    Args:
        device: cpu or cuda.
        concurrency: actors, at the most; None: one a GPU, or a core as far as memory goes.
        address: of the cluster, or None.
        weights: bytes of the model.
        units: how many there are to make.

    Raises:
        UserError: there is no GPU, for which Ray would wait in silence.
    """
    if device == "cpu":
        fitting = ray.cluster_resources()["memory"] / (_MODELS_MEMORY * weights)
        return Pool(concurrency or max(1, int(min(sum(cores_there(address)), fitting, units))), 0)
    there = gpus_there()
    if not there:
        raise UserError("--device cuda: Ray sees no GPU; use --device cpu, or start a node that has one")
    if concurrency and there < concurrency:
        Console().print(f"Ray sees {there} of --concurrency {concurrency} GPUs: others join when the cluster has them")
    return Pool(concurrency or there, 1, room=min(there, units))


def run_units(
    run: Run,
    sizes: Sequence[int],
    build: Build,
    collect: Collect,
    *,
    title: str,
    address: str | None,
    max_reject_rate: float,
) -> list[UnitRecord]:
    """Run the units that are not committed yet.

    Args:
        run: where units are committed, opened.
        sizes: number of input rows of each unit.
        build: the job's stages.
        collect: from what they yield to records.
        title: for the progress bar.
        address: of a Ray cluster, or None.
        max_reject_rate: rejects a row above which the job stops.

    Returns:
        The records of all units, in order.

    Raises:
        UserError: raised by a stage, passed on without Ray's wrapping; or too many rows were rejected.
    """
    records = run.records()
    rate = RejectRate(max_reject_rate, run.out)
    for record in records.values():
        rate.add(record)
    todo = [unit for unit in range(len(sizes)) if unit not in records]
    pace = Pace()
    with job_progress() as progress:
        done = sum(sizes[unit] for unit in records)
        task = progress.add_task(title, total=sum(sizes), completed=done, note="", under_way="")
        if todo:
            with connected(address), _plain_errors():
                source = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=len(todo))
                # Named, and so kept: Ray ends an actor that its driver has no handle of any more.
                ledger = SharedLedger()
                tables = build(source, ledger).iter_batches(batch_size=None, batch_format="pyarrow")
                with shown_under_way(progress, task, ledger.under_way):
                    for record in (record for table in tables for record in collect(table)):
                        if record.pairs_in != sizes[record.unit]:
                            run.record_path(record.unit).unlink()
                            raise UserError(
                                f"an input file changed while it was read: unit {record.unit} has {record.pairs_in} "
                                f"rows, expected {sizes[record.unit]}; run again with --overwrite"
                            )
                        records[record.unit] = record
                        rate.add(record)
                        pace.add(record)
                        ledger.retire(record.unit)
                        progress.update(task, advance=record.pairs_in, note=pace.words(rate.rejected))
    return [records[unit] for unit in range(len(sizes))]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a stage found or the cluster could not mend, without what Ray wraps around it."""
    try:
        yield
    except RayTaskError as error:
        cause = _user_error(error)
        if cause is None:
            raise
        raise cause from None
    except RayError as error:
        raise UserError(
            f"Ray could not go on: {type(error).__name__}: {_reason(error)}; "
            "what is committed stays, the same command goes on"
        ) from error


def _reason(error: RayError) -> str:
    """What an actor's constructor raised, which Ray writes behind its traceback; of anything else the first line."""
    lines = str(error).strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    if not frames:
        return lines[0]
    said = " ".join(dropwhile(lambda line: line.startswith(" "), lines[frames[-1] :]))
    return said.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")


def _user_error(error: BaseException) -> UserError | None:
    """The UserError, or the failure of storage, inside what Ray wrapped around it, if that is what it was."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, UserError):
            # Ray Data adds how often it tried.
            return UserError(
                str(getattr(current, "cause", current)).partition("Failed to apply UDF transform")[0].strip()
            )
        if isinstance(current, OSError) and current.errno in PASSING_ERRNOS:
            where = current.filename or "storage"
            return UserError(f"{where}: {current.strerror}, tried {_RETRIES + 1} times; the same command goes on")
        current = getattr(current, "cause", None) or current.__cause__
    return None
