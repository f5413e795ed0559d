"""Share a cluster's CPU cores, GPUs and memory out between the stages of a job."""

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
"""Memory of an actor on CPU, as a multiple of its model's weights."""

_TASK_BYTES = 300 << 20
"""Memory of a decoding task besides its pixels: libraries, the files that it reads, the decoder's process."""


@dataclass(frozen=True)
class Pool:
    """The model actors of one stage.

    Attributes:
        size: number of actors; the maximum if ``room`` is given.
        num_gpus: share of a GPU per actor; 0 on CPU.
        threads: concurrent calls per actor.
        room: number of actors to start with; more are started when the cluster has room. None: the pool is fixed, as
            it must be if several stages share GPUs, which Ray would otherwise share out by halves.
    """

    size: int
    num_gpus: float
    threads: int = 1
    room: int | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of Ray Data's ``map_batches``.

        Actors ask for a tiny part of a CPU slot. An actor uses one core (:func:`set_reproducible_arithmetic`) but must
        leave slots for decoding; and Ray Data fuses neighbouring stages with equal demands, after which decoding would
        wait for the model.
        """
        compute = ray.data.ActorPoolStrategy(
            min_size=1 if self.room else self.size,
            max_size=self.size,
            initial_size=min(self.size, self.room or self.size),
            enable_true_multi_threading=self.threads > 1,
            max_concurrent_calls_per_actor=self.threads if self.threads > 1 else None,
        )
        return {"compute": compute, "num_gpus": self.num_gpus, "num_cpus": _ACTOR_CPUS}


def cluster_gpus() -> int:
    """Return the number of GPUs of the connected cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def cores_by_machine(address: str | None) -> list[int]:
    """Return the cores of each living machine of the cluster, or of this machine if there is no ``address``."""
    if not address:  # a local Ray is started with more CPU slots than there are cores
        return [os.cpu_count() or 1]
    cores = (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return [count for count in cores if count] or [1]


def share_gpus(wanted: Mapping[str, tuple[int, float]], num_gpus: int) -> dict[str, float]:
    """Share GPUs out between the stages of a job, which all run at once: a stage without its share would wait forever.

    Args:
        wanted: for each stage its number of actors and the smallest share of a GPU that one needs.
        num_gpus: GPUs of the cluster.

    Returns:
        The share of each actor by stage, largest first: what it needs plus its part of what is left over, so that
        actors do not crowd on one GPU while another is idle.

    Raises:
        UserError: not even the least shares fit.
    """
    largest_first = sorted(wanted.items(), key=lambda item: -item[1][1])
    free = [1.0] * num_gpus
    for _, (size, least) in largest_first:
        for _ in range(size):
            gpu = next((number for number, room in enumerate(free) if room >= least - _ROUNDING), None)
            if gpu is None:
                parts = ", ".join(f"{name} {size} x {least:g}" for name, (size, least) in wanted.items())
                raise UserError(
                    f"--device cuda: Ray sees {num_gpus} GPUs, too few for the actors ({parts}); use fewer "
                    "(--concurrency), or score one reward after another into the same --out"
                )
            free[gpu] -= least
    on_one = sum(math.ceil(size / num_gpus) * least for size, least in wanted.values())
    scale = max(1.0, 1 / on_one)
    # Ray counts in ten-thousandths; rounding up could ask for more than there is.
    return {name: math.floor(least * scale * 1e4 + _ROUNDING) / 1e4 for name, (_, least) in largest_first}


def limit_memory(dataset: ray.data.Dataset, limit: int) -> None:
    """Let a job keep at most ``limit`` bytes in Ray's object store: stages wait rather than run ahead of a slow one."""
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=limit)


def task_memory(unit_bytes: int, remedy: str = "a smaller --pairs-per-shard or --shard-size") -> int:
    """Return the memory in bytes to request for a task that decodes or encodes a unit of ``unit_bytes`` of pixels.

    Raises:
        UserError: no node has that much; Ray would wait for one in silence.
    """
    wanted = _TASK_BYTES + unit_bytes
    largest = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    if wanted > largest:
        raise UserError(
            f"a unit of work is {unit_bytes / 1e9:.1f} GB of decoded pixels, more than any node has memory for "
            f"({largest / 1e9:.1f} GB by Ray's count): use {remedy}"
        )
    return wanted


def model_pool(device: str, concurrency: int | None, address: str | None, weights: int, units: int) -> Pool:
    """Make a pool of actors with one GPU, or one core, each; print a line if there are fewer GPUs than actors.

    Args:
        device: cpu or cuda.
        concurrency: maximum number of actors; None: one per GPU, or per core as far as memory allows.
        address: of the cluster, or None.
        weights: bytes of the model.
        units: number of units of the job.

    Raises:
        UserError: there is no GPU; Ray would wait for one in silence.
    """
    if device == "cpu":
        fitting = ray.cluster_resources()["memory"] / (_MODELS_MEMORY * weights)
        return Pool(concurrency or max(1, int(min(sum(cores_by_machine(address)), fitting, units))), 0)
    num_gpus = cluster_gpus()
    if not num_gpus:
        raise UserError("--device cuda: Ray sees no GPU; use --device cpu, or start a node that has one")
    if concurrency and num_gpus < concurrency:
        Console().print(f"--concurrency {concurrency}: Ray sees {num_gpus} GPUs; actors for the others start later")
    return Pool(concurrency or num_gpus, 1, room=min(num_gpus, units))
