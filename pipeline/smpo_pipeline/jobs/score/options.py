"""The flags of ``smpo-pipeline score``. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smpo_common.options import Flag, Options
from smpo_pipeline.options import ColumnOptions, Dtype, JobOptions, LabelsFile, OutOrUrl, Pairs, Rewards


class ScoreJobOptions(JobOptions):
    """Settings of the job."""

    batch_size: Annotated[int | None, Field(ge=1)] = None
    """Images per model call; default: each reward's own."""
    dtype: Dtype = "fp32"
    """Dtype of the reward models' matrix products. Half precision is faster on a GPU and rounds scores; see
    docs/results/benchmarks.md."""
    concurrency: Annotated[tuple[str, ...], Flag(metavar="N|NAME=N")] = ()
    """Actors of each reward: N, or NAME=N for one of them, repeatable. Default: one per GPU; on CPU enough to use all
    cores."""


class ScoreOptions(Options):
    """The flags of ``score``."""

    pairs: Pairs
    reward: Rewards
    out: OutOrUrl
    labels: LabelsFile = None
    columns: ColumnOptions = ColumnOptions()
    running: ScoreJobOptions = ScoreJobOptions()
