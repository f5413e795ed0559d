"""The flags of ``smpo-pipeline generate``. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, PlainValidator, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options
from smpo_pipeline.generation.options import SamplingOptions
from smpo_pipeline.generation.source import Loading, find_source
from smpo_pipeline.generation.source import ModelSource as Source
from smpo_pipeline.options import (
    AutoBatchSize,
    Concurrency,
    CostOptions,
    ExistingPath,
    ExistingPathOrUrl,
    JobOptions,
    MaxRejectRate,
    ModelDtype,
    ModelSource,
    OutOrUrl,
)
from smpo_schemas.generation.candidates import ImageFormat

_IMAGES_PER_FILE = 256


def _keep(value: Any) -> str | None:  # noqa: ANN401  (a user's string)
    name, _, number = str(value).partition(":")
    if value is None or value == "latents" or (name == "states" and number.isdecimal() and int(number) > 0):
        return value
    raise UserError(f"--keep {value}: expected latents, or states:M with a number of states from 1")


class CandidateOptions(SamplingOptions):
    """How images are sampled."""

    images_per_prompt: Annotated[int, Field(ge=2)] = 16
    """Images per prompt, an even number: two are one row of the output."""

    @model_validator(mode="after")
    def _refuse_odd(self) -> Self:
        if self.images_per_prompt % 2:
            raise UserError(
                f"--images-per-prompt {self.images_per_prompt}: a row of the output is a pair of images; give an even "
                "number"
            )
        return self


class CandidateFileOptions(Options):
    """What is stored."""

    model_config = ConfigDict(title="What is stored")

    image_format: ImageFormat = "png"
    """Format of the images: png, webp (lossless), or jpeg (quality 95)."""
    keep: Annotated[str | None, PlainValidator(_keep), Flag(typed=str, metavar="latents|states:M")] = None
    """Store more than images. latents: what the VAE decoded. states:M: also M states of the sampler per image, at
    random steps that are the same for all images of a prompt. invert --source tracked and sampled use them."""
    prompts_per_file: Annotated[int | None, Field(ge=1)] = None
    """Prompts per file; a file is also the unit of work. Default: as many as have 256 images."""


class GenerateJobOptions(JobOptions):
    """Settings of the job."""

    batch_size: Annotated[
        AutoBatchSize,
        Field(
            description="Images per model call, or auto: the largest batch that fits on the GPU; on CPU the smallest "
            "whose doubling gains less than 5 %. Fewer if memory runs out."
        ),
    ] = 8
    dtype: ModelDtype = None
    concurrency: Concurrency = None
    limit: Annotated[int | None, Field(ge=1)] = None
    """Use only the first N prompts."""
    max_reject_rate: Annotated[
        MaxRejectRate,
        Field(description="Stop if a larger share of the prompts is rejected (of the first 200, then of all so far)."),
    ] = 0.05


class GenerationPlanOptions(CostOptions):
    """Settings of a plan."""

    plan: Annotated[bool, Flag(recorded=False)] = False
    """Do not generate: sample for a minute on this machine, and print hours, bytes and dollars."""


class GenerateOptions(Options):
    """The flags of ``generate``."""

    model: Annotated[ModelSource, Flag(place=True)]
    """Text-to-image model: hub id or diffusers folder."""
    prompts: Annotated[ExistingPathOrUrl, Flag(typed=str, metavar="FILE|URL", place=True)]
    """Prompts: .txt with one per line, or .json, .jsonl, .csv, .tsv or .parquet with a column prompt, prompts or
    caption, whose other columns are carried through. A repeated prompt is taken once."""
    out: OutOrUrl
    unet: ExistingPath | None = None
    """Denoiser to use instead of the model's own: a folder, such as an output of smpo-train."""
    lora: ExistingPath | None = None
    """LoRA of smpo-train on top of the model's denoiser: its file, or the output folder."""
    negative: ExistingPath | None = None
    """Guide away from this output of smpo-train or merge, in place of the model's own unconditional prediction
    (Diffusion-NPO). Both are in memory. Needs a guidance scale above 1."""
    sampling: CandidateOptions = CandidateOptions()
    storing: CandidateFileOptions = CandidateFileOptions()
    running: GenerateJobOptions = GenerateJobOptions()
    planning: GenerationPlanOptions = GenerationPlanOptions()

    @property
    def source(self) -> Source:
        """The model to sample with; its base is ``model``."""
        negative = None
        if self.negative:
            given = f"--negative {self.negative}"
            negative = find_source("negative", given, str(self.negative), flag=given)
        if self.unet:
            return Source("unet", str(self.unet), "denoiser", f"--unet {self.unet}", negative)
        if self.lora:
            return Source("lora", str(self.lora), "lora", f"--lora {self.lora}", negative)
        return Source("model", self.model, "pipeline", f"--model {self.model}", negative)

    @property
    def loading(self) -> Loading:
        """What the model is loaded from."""
        return Loading(self.source, self.model, self.sampling.variant, self.sampling.sampler)

    @property
    def prompts_per_file(self) -> int:
        """Prompts of a unit."""
        return self.storing.prompts_per_file or max(1, _IMAGES_PER_FILE // self.sampling.images_per_prompt)

    @model_validator(mode="after")
    def _refuse_two_denoisers(self) -> Self:
        if self.unet and self.lora:
            raise UserError(f"--unet {self.unet} and --lora {self.lora}: give only one of them")
        return self
