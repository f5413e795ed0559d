"""Starting Ray, and running units through it with progress and one-line errors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smpo_pipeline.jobs.run import Run, UnitRecord
from smpo_schemas.errors import UserError

Build = Callable[[ray.data.Dataset], ray.data.Dataset]
"""Adds a job's stages to a dataset of rows {"unit": number}; the last one yields rows {"record": JSON}."""

_ACTOR_CPUS = 0.01
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
        options |= {"num_cpus": max(_LOGICAL_CPUS, os.cpu_count() or 1), "include_dashboard": False}
    try:
        with _native_stderr_silenced():
            ray.init(**options)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--ray-address {address}: {error}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
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


def actor_options(device: str, concurrency: int, pools: int = 1) -> dict[str, Any]:
    """What the model actors of one of a job's ``pools`` stages ask of Ray.

    A GPU is shared between the stages: one that waited for another to end would wait forever. CPU slots are a tiny
    part: threads are shared out by :func:`use_threads`, actors must leave slots for decoding, and Ray Data fuses
    neighbouring stages of equal demands, after which decoding would wait for the model.
    """
    return {
        "compute": ray.data.ActorPoolStrategy(size=concurrency),
        "num_gpus": 1 / pools if device == "cuda" else 0,
        "num_cpus": _ACTOR_CPUS,
    }


def use_threads(device: str, concurrency: int) -> None:
    """Inside an actor on CPU: share the machine's cores between the actors (Ray's default is one thread each)."""
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // concurrency))


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


def _require_gpus(device: str, concurrency: int) -> None:
    """Refuse what Ray would wait for in silence.

    Raises:
        UserError: fewer GPUs than model actors.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    if device == "cuda" and there < concurrency:
        raise UserError(f"--device cuda --concurrency {concurrency}: Ray sees {there} GPUs; use --device cpu or fewer")


def run_units(
    run: Run, sizes: Sequence[int], build: Build, *, title: str, address: str | None, device: str, concurrency: int
) -> list[UnitRecord]:
    """Run the units that are not committed yet.

    Args:
        run: the output directory, opened.
        sizes: number of input rows of each unit.
        build: the job's stages.
        title: for the progress bar.
        address: of a Ray cluster, or None.
        device: of the model actors.
        concurrency: number of model actors a stage.

    Returns:
        The records of all units, in order.

    Raises:
        UserError: raised by a stage, passed on without Ray's wrapping.
    """
    records = run.records()
    todo = [unit for unit in range(len(sizes)) if unit not in records]
    with _progress() as progress:
        task = progress.add_task(title, total=sum(sizes), completed=sum(sizes[unit] for unit in records), note="")
        if todo:
            with connected(address):
                _require_gpus(device, concurrency)
                source = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=len(todo))
                try:
                    for row in build(source).iter_rows():
                        record = UnitRecord.model_validate(json.loads(row["record"]))
                        if record.pairs_in != sizes[record.unit]:
                            run.record_path(record.unit).unlink()
                            raise UserError(
                                f"an input file changed while it was read: unit {record.unit} has {record.pairs_in} "
                                f"rows, expected {sizes[record.unit]}; run again with --overwrite"
                            )
                        records[record.unit] = record
                        rejected = sum(len(each.rejects) for each in records.values())
                        progress.update(task, advance=record.pairs_in, note=f"{rejected} rejected" if rejected else "")
                except RayTaskError as error:
                    cause = _user_error(error)
                    if cause is None:
                        raise
                    raise cause from None
    return [records[unit] for unit in range(len(sizes))]


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
