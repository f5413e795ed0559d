"""The flags of ``smpo-pipeline evaluate``. Does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from smpo_common.options import Flag, Options, Overwrite
from smpo_pipeline.options import FILE, Device, LocalPath, ModelDtype, Out, Rewards, Variant


class SamplingOptions(Options):
    """How images are generated."""

    model_config = ConfigDict(title="Sampling")

    images_per_prompt: Annotated[int, Field(ge=1)] = 8
    """Images per prompt, each from its own noise."""
    steps: Annotated[int | None, Field(ge=1)] = None
    """Steps per image, DDIM's or of a flow model's own sampler. Default: 50; 28 for SD3 and FLUX.1-dev, 4 for
    FLUX.1-schnell, 20 for PixArt-Sigma and Sana."""
    guidance_scale: Annotated[float | None, Field(ge=0)] = None
    """Classifier-free guidance, 1 is none; of FLUX.1-dev, the guidance that the model is told. Default: 7.5; 7 for SD3,
    4.5 for SD3.5, PixArt-Sigma and Sana, 3.5 for FLUX.1-dev, 6 for Z-Image, whose own pipeline counts from 0 and calls
    it 5. FLUX.1-schnell takes none."""
    seed: int = 0
    """Seed of the initial noise, which is the same for all models."""
    resolution: Annotated[int | None, Flag(metavar="PIXELS"), Field(ge=8)] = None
    """Side of the images. Default: the models' native resolution."""
    variant: Variant = None


class EvaluateJobOptions(Options):
    """How the evaluation runs."""

    model_config = ConfigDict(title="Running")

    batch_size: Annotated[int, Field(ge=1)] = 8
    """Images generated, and scored, at once."""
    device: Device = None
    dtype: ModelDtype = None
    limit: Annotated[int | None, Field(ge=1)] = None
    """Use only the first N prompts."""
    overwrite: Overwrite = False
    """Replace an evaluation in --out; images of the same settings are reused."""


class EvaluateOptions(Options):
    """The settings of ``evaluate``."""

    model: Annotated[tuple[str, ...], Flag(metavar="NAME=DIR", place="named")]
    """A model to compare: a diffusers pipeline (folder or hub id) or an output of smpo-train. The first is the
    baseline. Repeatable."""
    prompts: Annotated[LocalPath, FILE]
    """Prompts: .txt with one per line, or .jsonl or .parquet with a column prompt or caption."""
    reward: Rewards
    out: Out
    base: Annotated[str | None, Flag(metavar="MODEL", place=True)] = None
    """The pipeline that an output of smpo-train was trained from. Default: the first --model that is a whole
    pipeline."""
    sampling: SamplingOptions = SamplingOptions()
    running: EvaluateJobOptions = EvaluateJobOptions()
