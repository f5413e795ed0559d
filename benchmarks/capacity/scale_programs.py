"""The programs that scale.py measures, each in a process of its own: jobs with stand-ins for the models.

python -m benchmarks.capacity.scale_programs PROGRAM WORK NUMBER
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.cluster_utils import Cluster

import smpo_pipeline.jobs.invert.job as invert_job
import smpo_pipeline.jobs.score.job as score_job
from smpo_pipeline.inversion.batch import PreparedPair, draw_trajectory
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.isolation import Failure
from smpo_pipeline.jobs.cells import cell_values
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.invert.options import InvertJobOptions, InvertOptions, ModelOptions
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.chunks import with_scores, without_images
from smpo_pipeline.jobs.score.options import ScoreJobOptions, ScoreOptions
from smpo_pipeline.toy.create import ASSETS
from smpo_schemas.shards.samples import Sample

SECONDS = 1.0
"""Duration of a unit of PAIRS_A_UNIT pairs, for the measurement of workers."""

NODE = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False}

PAIRS_A_UNIT, UNITS_A_WORKER = 16, 6
FILE_PAIRS = 2000


class StandIn:
    """Stands in for the inverter: sleeps, and returns samples of the right shapes."""

    def __init__(self, actor: InvertActor, seconds: float) -> None:
        self._seconds = seconds
        self._family, self._options = actor._family, actor._options  # noqa: SLF001  (stands in its place)

    def invert(self, requests: Sequence[tuple[PreparedPair, int]]) -> tuple[list[Sample | Failure], HealthSums]:
        """A batch."""
        time.sleep(self._seconds * len(requests) / PAIRS_A_UNIT)
        return [self._sample(pair, number) for pair, number in requests], HealthSums()

    def _sample(self, pair: PreparedPair, number: int) -> Sample:
        settings = self._options.settings
        trajectory = draw_trajectory(pair, number, self._family, settings, self._options.trajectory.seed)
        latent, states = self._family.latent_shape(*pair.image_size), len(trajectory.plan.stored)
        return Sample(
            trajectory.meta(),
            torch.zeros(2, *latent, dtype=torch.float16),
            torch.zeros(states, 2, *latent, dtype=torch.float16),
            torch.tensor(trajectory.plan.used_at),
            torch.zeros(states, 2),
            torch.zeros(states, 2),
        )


class FixedTimeActor(InvertActor):
    """The actor with the stand-in; records the end of each unit."""

    def __init__(self, options: InvertOptions, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(options, **kwargs)
        self._inverter = StandIn(self, SECONDS)
        self._notes = options.out.parent / "units.jsonl"

    def __call__(self, row: pa.Table) -> pa.Table:
        """Commit one unit."""
        record = super().__call__(row)
        with self._notes.open("a") as file:
            print(json.dumps([os.getpid(), time.time()]), file=file)
        return record


class FreeInvertActor(InvertActor):
    """The actor with a stand-in that takes no time."""

    def __init__(self, options: InvertOptions, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(options, **kwargs)
        self._inverter = StandIn(self, 0.0)


class FreeActor(RewardActor):
    """Stands in for a reward: all images score 0."""

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Score a chunk."""
        return without_images(with_scores(chunk, {self._reward.name: np.zeros(len(cell_values(chunk, "height")))}, {}))


def invert_options(work: Path, out: Path, pairs: Sequence[Path], limit: int, **more: Any) -> InvertOptions:  # noqa: ANN401
    """Options of `invert`; ``more`` is by flag name."""
    options = InvertOptions(
        pairs=tuple(pairs),
        scores=work / "scores",
        out=out / "shards",
        models=ModelOptions(model=str(ASSETS / "model")),
        running=InvertJobOptions(device="cpu", limit=limit, max_reject_rate=0.0),
    )
    return options.replace(**more)


def run_workers(work: Path, workers: int) -> None:
    """Run `invert` with this many actors; prints pairs per second."""
    invert_job.InvertActor = FixedTimeActor
    units = workers * UNITS_A_WORKER
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    for _ in range(workers):
        cluster.add_node(**NODE)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        sizes = {"pairs_per_shard": PAIRS_A_UNIT, "batch_size": PAIRS_A_UNIT}
        cluster_flags = {"concurrency": workers, "ray_address": cluster.address}
        limit = units * PAIRS_A_UNIT
        invert_job.invert(invert_options(work, out, [work / "pairs.parquet"], limit, **sizes, **cluster_flags))
        notes = [json.loads(line) for line in (out / "units.jsonl").read_text().splitlines()]
    cluster.shutdown()
    began = {}
    for process, end in notes:
        began.setdefault(process, end)
    start = max(began.values())
    counted = [end for _, end in notes if end > start]
    print(json.dumps(PAIRS_A_UNIT * len(counted) / (max(counted) - start)))


def run_invert_memory(work: Path, pairs: int) -> None:
    """Run `invert` on this many pairs."""
    invert_job.InvertActor = FreeInvertActor
    files = input_files(work, "invert", pairs)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"pairs_per_shard": 128, "batch_size": 16, "concurrency": 1, "ray_address": None}
        invert_job.invert(invert_options(work, Path(folder), files, pairs, **flags))


def input_files(work: Path, job: str, pairs: int) -> list[Path]:
    """Parquet files for the memory measurement of a job."""
    return [work / f"{job}-{number:03d}.parquet" for number in range(max(1, pairs // FILE_PAIRS))]


def run_score_memory(work: Path, pairs: int) -> None:
    """Run `score` on this many pairs."""
    score_job.RewardActor = FreeActor
    files = input_files(work, "score", pairs)
    with tempfile.TemporaryDirectory() as folder:
        score_job.score(
            ScoreOptions(
                pairs=tuple(files),
                out=Path(folder) / "scores",
                reward=(f"pickscore={ASSETS / 'rewards/pickscore'}",),
                running=ScoreJobOptions(device="cpu", limit=pairs, max_reject_rate=0.0),
            )
        )


PROGRAMS = {"workers": run_workers, "score memory": run_score_memory, "invert memory": run_invert_memory}


def main() -> None:
    """Run one program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("work", type=Path, help="folder of the inputs")
    parser.add_argument("number", type=int, help="workers, or pairs")
    arguments = parser.parse_args()
    PROGRAMS[arguments.program](arguments.work, arguments.number)


if __name__ == "__main__":
    main()
