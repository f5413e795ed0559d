"""Starting Ray, and running units through it with progress and one-line errors."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smpo_pipeline.jobs.ledger import SharedLedger
from smpo_pipeline.jobs.reject_rate import RejectRate
from smpo_pipeline.jobs.run import Run, UnitRecord
from smpo_schemas.errors import UserError
from smpo_schemas.passing import PASSING_ERRNOS

Build = Callable[[ray.data.Dataset, SharedLedger], ray.data.Dataset]
"""Adds a job's stages to a dataset of rows {"unit": number}; the ledger is for their workers."""

Collect = Callable[[pa.Table], Iterable[UnitRecord]]
"""Takes what the last stage yields, on the driver; returns the records of the units that are committed with it."""

_ACTOR_CPUS = 0.01
_ROUNDING = 1e-6
_DEATHS_LOADING = 5
_RETRIES = 5
_LOGICAL_CPUS = 4
"""At least this many on a local Ray: CPU stages must not wait for a slot that the actors hold."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A Ray session: the cluster at ``address``, or a local one that ends with the block.

    Raises:
        UserError: no cluster answers at ``address``.
    """
    # The driver's progress bar says what users need; Ray's own log lines would tear it apart.
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        options["address"] = address
    else:
        # By name: without one Ray joins a cluster that happens to run on this machine.
        options |= {"address": "local", "num_cpus": max(_LOGICAL_CPUS, os.cpu_count() or 1), "include_dashboard": False}
    try:
        with _native_stderr_silenced():
            ray.init(**options)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--ray-address {address}: {error}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A row is a piece of work that we cut ourselves: each one travels on as soon as it is there.
    context.target_max_block_size = 1
    # A worker that dies later is started again without limit; by default one that dies while it loads ends the job.
    context.max_consecutive_actor_init_deaths = _DEATHS_LOADING
    # With pauses that double. A unit's task gives the same from its start on, as this asks for.
    context.retried_map_errors = [os.strerror(number) for number in PASSING_ERRNOS]
    context.max_map_retries = _RETRIES
    try:
        yield
    finally:
        ray.shutdown()


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
        size: how many.
        num_gpus: share of a GPU that each asks for; 0 on cpu.
        threads: calls that each works on at once.
    """

    size: int
    num_gpus: float
    threads: int = 1

    def options(self) -> dict[str, Any]:
        """What Ray Data is told.

        CPU slots are a tiny part: cores are shared out by :func:`use_threads`, actors must leave slots for decoding,
        and Ray Data fuses neighbouring stages of equal demands, after which decoding would wait for the model.
        """
        compute = ray.data.ActorPoolStrategy(
            size=self.size,
            enable_true_multi_threading=self.threads > 1,
            max_concurrent_calls_per_actor=self.threads if self.threads > 1 else None,
        )
        return {"compute": compute, "num_gpus": self.num_gpus, "num_cpus": _ACTOR_CPUS}


def gpus_there() -> int:
    """GPUs of the cluster that is connected to."""
    return int(ray.cluster_resources().get("GPU", 0))


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


def use_threads(device: str, workers: int) -> None:
    """Inside an actor: on CPU, share the machine's cores between so many ``workers`` (threads or actors).

    On a GPU, float32 is float32: by default cuDNN rounds what it convolves to TF32's 10 bits.
    """
    torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def check_device(device: str | None) -> str:
    """The device to use: the given one, else a GPU where there is one.

    Raises:
        UserError: neither ``cpu`` nor ``cuda``. Whether there are GPUs, only the cluster knows.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: cpu or cuda")
    return device


def require_gpus(device: str, concurrency: int) -> None:
    """Refuse what Ray would wait for in silence.

    Raises:
        UserError: fewer GPUs than model actors of one GPU each.
    """
    there = gpus_there()
    if device == "cuda" and there < concurrency:
        raise UserError(f"--device cuda --concurrency {concurrency}: Ray sees {there} GPUs; use --device cpu or fewer")


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
    with _progress() as progress:
        task = progress.add_task(title, total=sum(sizes), completed=sum(sizes[unit] for unit in records), note="")
        if todo:
            with connected(address), _plain_errors():
                source = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=len(todo))
                # Named, and so kept: Ray ends an actor that its driver has no handle of any more.
                ledger = SharedLedger()
                for table in build(source, ledger).iter_batches(batch_size=None, batch_format="pyarrow"):
                    for record in collect(table):
                        if record.pairs_in != sizes[record.unit]:
                            run.record_path(record.unit).unlink()
                            raise UserError(
                                f"an input file changed while it was read: unit {record.unit} has {record.pairs_in} "
                                f"rows, expected {sizes[record.unit]}; run again with --overwrite"
                            )
                        records[record.unit] = record
                        rate.add(record)
                        note = f"{rate.rejected} rejected" if rate.rejected else ""
                        progress.update(task, advance=record.pairs_in, note=note)
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
    """The UserError inside what Ray wrapped around it, if that is what it was."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, UserError):
            return UserError(str(getattr(current, "cause", current)))
        current = getattr(current, "cause", None) or current.__cause__
    return None


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pairs"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("[yellow]{task.fields[note]}"),
    )
