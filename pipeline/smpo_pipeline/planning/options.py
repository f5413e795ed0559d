"""What ``smpo-pipeline plan`` is told: the flags of ``invert``, and its own. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from smpo_common.options import Flag, Options
from smpo_pipeline.jobs.invert.options import InversionOptions, InvertJobOptions
from smpo_pipeline.options import FILE, FOLDER_OR_URL, ExistingPathOrUrl, OutFile


class PlanJobOptions(InvertJobOptions):
    """The flags of `invert` that change what a device does; the others are taken, so that its command line is."""

    concurrency: Annotated[int | None, Flag(hidden=True), Field(ge=1)] = None
    ray_address: Annotated[str | None, Flag(hidden=True)] = None
    overwrite: Annotated[bool, Flag(hidden=True)] = False


class ProjectionOptions(Options):
    """What is projected, and from how long a measurement."""

    model_config = ConfigDict(title="Plan")

    scores: Annotated[ExistingPathOrUrl | None, FOLDER_OR_URL] = None
    """Output of `score`: which rewards the shards will carry; default: one."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """Devices (on cpu: cores) at work at once."""
    price: Annotated[float | None, Field(ge=0)] = None
    """Dollars for one device hour."""
    seconds: Annotated[float, Field(ge=0.1)] = 60.0
    """How long to measure, warm-up included."""
    json_: Annotated[OutFile | None, FILE] = None
    """Write the plan as JSON, too."""


class PlanOptions(InversionOptions):
    """The settings of ``plan``."""

    running: PlanJobOptions = PlanJobOptions()
    projection: ProjectionOptions = ProjectionOptions()
    out: Annotated[str | None, Flag(hidden=True)] = None
