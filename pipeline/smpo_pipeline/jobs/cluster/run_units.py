"""Run a job's units, through Ray Data or in this process, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pyarrow as pa
import ray

from smpo_common.errors import UserError
from smpo_pipeline.jobs.cluster.errors import unwrap_ray_errors
from smpo_pipeline.jobs.cluster.session import connected
from smpo_pipeline.jobs.record.progress import Pace, job_progress, show_pairs_in_progress
from smpo_pipeline.jobs.record.reject_rate import RejectRate
from smpo_pipeline.jobs.record.run_record import UnitRecord, Units
from smpo_pipeline.jobs.record.work_log import WorkLog, shared_work_log

Build = Callable[[ray.data.Dataset, WorkLog], ray.data.Dataset]
"""Adds a job's stages to a dataset of rows {"unit": number}; the log is for their workers."""

Collect = Callable[[pa.Table], Iterable[UnitRecord]]
"""Takes what the last stage yields, on the driver; returns the records of the units that it completes."""


Make = Callable[[WorkLog], Callable[[pa.Table], pa.Table]]
"""Returns what makes the unit of a row {"unit": number} in this process; the log is for its progress."""

_Stages = Callable[[Sequence[int]], AbstractContextManager[tuple[Iterable[pa.Table], WorkLog]]]
"""Starts the work on units; yields what the last stage yields, and the workers' log."""


def run_units(
    run: Units,
    sizes: Sequence[int],
    build: Build,
    collect: Collect,
    *,
    title: str,
    address: str | None,
    max_reject_rate: float = 1.0,
    noun: str = "pairs",
) -> list[UnitRecord]:
    """Run the units that are not committed yet on Ray.

    Args:
        run: where units are committed, opened.
        sizes: number of input rows of each unit.
        build: adds the job's stages.
        collect: turns their output into records.
        title: for the progress bar.
        address: of a Ray cluster, or None.
        max_reject_rate: stop above this share of rejected rows, 0 to 1.
        noun: what the input rows are.

    Returns:
        The records of all units, in order.

    Raises:
        UserError: a stage raised it; too many rows were rejected; or an input file changed.
    """
    rate = RejectRate(max_reject_rate, run.out, noun)
    return _run(run, sizes, partial(_on_ray, build, address), collect, rate, title, noun)


def run_units_here(
    run: Units, sizes: Sequence[int], make: Make, collect: Collect, *, title: str, noun: str = "pairs"
) -> list[UnitRecord]:
    """Run the units that are not committed yet in this process, one after another; see :func:`run_units`."""
    return _run(run, sizes, partial(_here, make), collect, RejectRate(1.0, run.out, noun), title, noun)


@contextmanager
def _on_ray(build: Build, address: str | None, todo: Sequence[int]) -> Iterator[tuple[Iterable[pa.Table], WorkLog]]:
    with connected(address), unwrap_ray_errors():
        source = ray.data.from_items([{"unit": unit} for unit in todo], override_num_blocks=len(todo))
        # The variable keeps the actor alive: Ray ends an actor once its driver holds no handle of it.
        work_log = shared_work_log()
        yield build(source, work_log).iter_batches(batch_size=None, batch_format="pyarrow"), work_log


@contextmanager
def _here(make: Make, todo: Sequence[int]) -> Iterator[tuple[Iterable[pa.Table], WorkLog]]:
    work_log = WorkLog()
    work = make(work_log)
    yield (work(pa.table({"unit": [unit]})) for unit in todo), work_log


def _run(
    run: Units, sizes: Sequence[int], stages: _Stages, collect: Collect, rate: RejectRate, title: str, noun: str
) -> list[UnitRecord]:
    records = run.records()
    for record in records.values():
        rate.add(record)
    todo = [unit for unit in range(len(sizes)) if unit not in records]
    pace = Pace(noun=noun)
    with job_progress(noun) as progress:
        done = sum(sizes[unit] for unit in records)
        task = progress.add_task(title, total=sum(sizes), completed=done, note="", in_progress="")
        if todo:
            with (
                stages(todo) as (tables, work_log),
                show_pairs_in_progress(progress, task, work_log.pairs_in_progress),
            ):
                for record in (record for table in tables for record in collect(table)):
                    if record.pairs_in != sizes[record.unit]:
                        run.forget(record.unit)
                        raise UserError(
                            f"an input file changed while it was read: unit {record.unit} has {record.pairs_in} "
                            f"rows, expected {sizes[record.unit]}; run again with --overwrite"
                        )
                    records[record.unit] = record
                    rate.add(record)
                    pace.add(record)
                    work_log.retire(record.unit)
                    progress.update(task, advance=record.pairs_in, note=pace.describe(rate.rejected))
    return [records[unit] for unit in range(len(sizes))]
