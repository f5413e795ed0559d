"""The flags of ``smpo-pipeline plan``: those of ``invert``, and its own. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options
from smpo_pipeline.jobs.invert.options import InversionOptions, InvertJobOptions
from smpo_pipeline.options import FOLDER_OR_URL, CostOptions, ExistingPathOrUrl, Pairs
from smpo_schemas.choices import OptimizerName, Quantization


class PlanJobOptions(InvertJobOptions):
    """The flags of `invert`; those without effect are accepted but hidden, so that its command line works here."""

    concurrency: Annotated[int | None, Flag(hidden=True), Field(ge=1)] = None
    ray_address: Annotated[str | None, Flag(hidden=True)] = None
    overwrite: Annotated[bool, Flag(hidden=True)] = False


class ProjectionOptions(CostOptions):
    """Settings of the projection."""

    scores: Annotated[ExistingPathOrUrl | None, FOLDER_OR_URL] = None
    """Output directory of `score`, for the number of rewards that the shards will hold; default: one."""


class MemoryOptions(Options):
    """The training to account for, by the flags of `smpo-train`."""

    model_config = ConfigDict(title="Memory of a GPU, for `invert` and `smpo-train`")

    gpu_memory: Annotated[float | None, Field(gt=0)] = None
    """GB of the GPU. Print what both commands need of it, and whether it fits; computed from the model's configs, in
    seconds, without weights or a GPU."""
    train_batch_size: Annotated[int, Field(ge=1)] = 8
    """--batch-size of `smpo-train`: states, of two images each."""
    grad_accum: Annotated[int, Field(ge=1)] = 1
    """As for `smpo-train`."""
    lora_rank: Annotated[int | None, Field(ge=1)] = None
    """As for `smpo-train`. Default: all weights are trained."""
    quantize: Quantization | None = None
    """As for `smpo-train`."""
    gradient_checkpointing: Annotated[bool, Flag(off="--no-gradient-checkpointing")] = False
    """As for `smpo-train`."""
    optimizer: OptimizerName = "adamw"
    """As for `smpo-train`."""
    ema_decay: Annotated[float | None, Field(ge=0, le=1)] = None
    """As for `smpo-train`."""

    @model_validator(mode="after")
    def _refuse_quantized_training(self) -> Self:
        if self.quantize and self.lora_rank is None:
            raise UserError(
                f"--quantize {self.quantize}: quantized weights cannot be trained; give --lora-rank too, for example "
                "--lora-rank 16, to train an adapter"
            )
        return self


class PlanOptions(InversionOptions):
    """The flags of ``plan``."""

    pairs: Pairs = ()
    memory: MemoryOptions = MemoryOptions()
    running: PlanJobOptions = PlanJobOptions()
    projection: ProjectionOptions = ProjectionOptions()
    out: Annotated[str | None, Flag(hidden=True)] = None
