"""What ``smpo-pipeline score`` is told: its flags. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smpo_common.options import Flag, Options
from smpo_pipeline.options import ColumnOptions, Dtype, JobOptions, OutOrUrl, Pairs, Rewards


class ScoreJobOptions(JobOptions):
    """How the job runs."""

    batch_size: Annotated[int | None, Field(ge=1)] = None
    """Images a model call; default: each reward's own."""
    dtype: Dtype = "fp32"
    """Of the reward models' matrix products. Half precision is faster on a GPU and rounds scores: by how much is in
    docs/results/benchmarks.md."""
    concurrency: Annotated[tuple[str, ...], Flag(metavar="N|NAME=N")] = ()
    """Actors of each reward: N, or NAME=N for one of them, repeatable. Default: one a GPU, or what keeps all cores
    busy."""


class ScoreOptions(Options):
    """The settings of ``score``."""

    pairs: Pairs
    reward: Rewards
    out: OutOrUrl
    columns: ColumnOptions = ColumnOptions()
    running: ScoreJobOptions = ScoreJobOptions()
