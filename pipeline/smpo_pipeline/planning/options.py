"""The flags of ``smpo-pipeline plan``: those of ``invert``, and its own. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from smpo_common.options import Flag, Options
from smpo_pipeline.jobs.invert.options import InversionOptions, InvertJobOptions
from smpo_pipeline.options import FILE, FOLDER_OR_URL, ExistingPathOrUrl, OutFile


class PlanJobOptions(InvertJobOptions):
    """The flags of `invert`; those without effect are accepted but hidden, so that its command line works here."""

    concurrency: Annotated[int | None, Flag(hidden=True), Field(ge=1)] = None
    ray_address: Annotated[str | None, Flag(hidden=True)] = None
    overwrite: Annotated[bool, Flag(hidden=True)] = False


class ProjectionOptions(Options):
    """Settings of the projection."""

    model_config = ConfigDict(title="Plan")

    scores: Annotated[ExistingPathOrUrl | None, FOLDER_OR_URL] = None
    """Output directory of `score`, for the number of rewards that the shards will hold; default: one."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """Number of devices (on CPU: cores) to plan for."""
    price: Annotated[float | None, Field(ge=0)] = None
    """Dollars per device hour."""
    seconds: Annotated[float, Field(ge=0.1)] = 60.0
    """Seconds to measure, warm-up included."""
    json_: Annotated[OutFile | None, FILE] = None
    """Write the plan to this file as JSON, too."""


class PlanOptions(InversionOptions):
    """The flags of ``plan``."""

    running: PlanJobOptions = PlanJobOptions()
    projection: ProjectionOptions = ProjectionOptions()
    out: Annotated[str | None, Flag(hidden=True)] = None
