"""The stages of a job that samples: actors that sample a unit's images -> tasks that encode and store them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import ray

from smpo_pipeline.jobs.cluster.pools import Pool, limit_memory, task_memory
from smpo_pipeline.jobs.generate.actor import GenerateActor, SamplingWork

_ONE: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}


def sampled(
    source: ray.data.Dataset,
    actor: type[GenerateActor],
    work: SamplingWork,
    content: Mapping[str, Any],
    pool: Pool,
) -> ray.data.Dataset:
    """Sample units.

    Args:
        source: rows {"unit": number}.
        actor: the class of the actors.
        work: of the job.
        content: see :class:`GenerateActor`.
        pool: of actors.
    """
    arguments = {"work": work, "content": content}
    return source.map_batches(actor, fn_constructor_kwargs=arguments, **_ONE, **pool.options())


def stored(
    made: ray.data.Dataset, write: Callable[[pa.Table], pa.Table], pool: Pool, unit_bytes: int, remedy: str
) -> ray.data.Dataset:
    """Encode and store sampled units.

    Args:
        made: by :func:`sampled`.
        write: stores the unit of a row; returns a row {"record": JSON}.
        pool: of the actors.
        unit_bytes: largest size of a unit.
        remedy: what makes units smaller.
    """
    written = made.map_batches(write, num_cpus=1, memory=task_memory(unit_bytes, remedy), **_ONE)
    # Units in Ray's object store: for each actor one that is sampled and one that is encoded, and two more.
    limit_memory(written, (unit_bytes + (1 << 20)) * (2 * pool.size + 2))
    return written
