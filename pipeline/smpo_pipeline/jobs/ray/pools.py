"""Sharing a cluster out: actors, GPUs, memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console

from smpo_common.errors import UserError

_ACTOR_CPUS = 0.01

_ROUNDING = 1e-6

_MODELS_MEMORY = 3
"""Memory of an actor on CPU, over its model's weights."""

_TASK_BYTES = 300 << 20
"""Of a task that decodes, over the pixels that it gives: libraries, the files that it reads, the decoder's process."""


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
