"""The flags of sampling that several commands share. Does not import torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from smpo_common.options import Flag, Options
from smpo_pipeline.options import Variant
from smpo_schemas.choices import SamplerChoice


class SamplingOptions(Options):
    """How images are sampled."""

    model_config = ConfigDict(title="Sampling")

    sampler: SamplerChoice = "model"
    """model: the scheduler that the model comes with, such as PNDM, Euler or DPM-Solver++. ddim: DDIM's first-order
    steps, which are Euler's for flow models; inversion follows those."""
    steps: Annotated[int | None, Field(ge=1)] = None
    """Steps per image. Default: the number in which the model is usually sampled, see docs/reference/families.md."""
    guidance_scale: Annotated[float | None, Field(ge=0)] = None
    """Classifier-free guidance, 1 is none; for FLUX.1-dev, its guidance input. Default: the scale at which the model is
    usually sampled, see docs/reference/families.md. FLUX.1-schnell takes none."""
    seed: int = 0
    """Seed of the initial noise. The noise of an image depends on the seed, its prompt and its number alone."""
    resolution: Annotated[int | None, Flag(metavar="PIXELS"), Field(ge=8)] = None
    """Side of the images. Default: the model's native resolution."""
    variant: Variant = None
