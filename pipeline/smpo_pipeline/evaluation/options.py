"""The flags of ``smpo-pipeline evaluate``. Does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator

from smpo_common.options import Flag, Options, Overwrite
from smpo_pipeline.generation.options import SamplingOptions
from smpo_pipeline.generation.suites import PromptSource
from smpo_pipeline.options import Device, ModelDtype, Out, Rewards
from smpo_schemas.choices import Dtype


class EvaluateSamplingOptions(SamplingOptions):
    """How images are generated."""

    images_per_prompt: Annotated[int, Field(ge=1)] = 8
    """Images per prompt, each from its own noise, which is the same for all models."""


class EvaluateJobOptions(Options):
    """How the evaluation runs."""

    model_config = ConfigDict(title="Running")

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Images generated, and scored, at once."""
    device: Device = None
    dtype: ModelDtype = None
    reward_dtype: Dtype = "fp32"
    """Dtype of the reward models' matrix products, like --dtype of score."""
    concurrency: Annotated[
        int | None,
        Field(ge=1, description="Maximum number of models that sample at once, each on one GPU. Default: one per GPU."),
    ] = None
    ray_address: Annotated[
        str | None, Field(description="Address of a Ray cluster to sample on. Default: the GPUs of this machine.")
    ] = None
    category_column: str | None = None
    """Column of the prompts' categories. Default: category, tag or style, where there is one."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Use only the first N prompts."""
    overwrite: Overwrite = False
    """Replace an evaluation in --out; images of the same settings are reused."""


class EvaluateOptions(Options):
    """The settings of ``evaluate``."""

    model: Annotated[tuple[str, ...], Flag(metavar="NAME=DIR", place="named")] = ()
    """A model to compare: a diffusers pipeline, a denoiser or a LoRA, by folder, file or hub id, such as an output of
    smpo-train. The first is the baseline; without models, the first folder of --images. Repeatable."""
    prompts: Annotated[
        PromptSource,
        PlainValidator(lambda value: value if isinstance(value, PromptSource) else PromptSource.parse(str(value))),
        PlainSerializer(str),
        Flag(typed=str, metavar="FILE|URL|SUITE[=PATH]"),
    ]
    """Prompts: .txt with one per line, or .json, .jsonl, .csv, .tsv or .parquet with a column prompt, prompts or
    caption. Or a published suite, from the hub or from its file or folder: hpsv2, parti, papv2, drawbench, geneval, as
    in parti or parti=PartiPrompts.tsv."""
    reward: Rewards
    out: Out
    images: Annotated[tuple[str, ...], Flag(metavar="NAME=DIR", place="named")] = ()
    """A folder of images that were made elsewhere, to compare like a model's: PROMPT.png or PROMPT-IMAGE.png by numbers
    from 0, GenEval's folders, or metadata.jsonl with file_name and prompt. Repeatable."""
    negative: Annotated[tuple[str, ...], Flag(metavar="NAME=DIR", place="named")] = ()
    """Guide the --model of this name away from this output of smpo-train or merge, in place of its own unconditional
    prediction (Diffusion-NPO). Both are in memory. Needs a guidance scale above 1. Repeatable."""
    base: Annotated[str | None, Flag(metavar="MODEL", place=True)] = None
    """The pipeline that completes denoisers and LoRAs. Default: the first --model that is a whole pipeline."""
    sampling: EvaluateSamplingOptions = EvaluateSamplingOptions()
    running: EvaluateJobOptions = EvaluateJobOptions()
