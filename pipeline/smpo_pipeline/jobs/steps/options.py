"""The flags of ``smpo-pipeline steps``. Imports neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options
from smpo_pipeline.jobs.invert.options import AlignedModelOptions
from smpo_pipeline.options import (
    AutoBatchSize,
    Concurrency,
    ExistingPath,
    ExistingPathOrUrl,
    JobOptions,
    MaxRejectRate,
    ModelDtype,
    OneReward,
    OutOrUrl,
    batches_in_words,
)
from smpo_schemas.choices import Dtype
from smpo_schemas.inversion_settings import InversionSettings


def _trained(value: Any) -> tuple[int, ...] | None:  # noqa: ANN401  (numbers, or a user's string)
    if value is None or isinstance(value, tuple):
        return value
    parts = [part.strip() for part in str(value).split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--trained {value}: expected numbers of steps, such as 20,16,12,8,4")
    return tuple(int(part) for part in parts)


class StepModelOptions(AlignedModelOptions):
    """The model to align, the denoiser that samples, and the size of images."""

    inverting_flag: ClassVar[str] = "--sampling-unet"

    sampling_unet: ExistingPath | None = None
    """Denoiser that samples, for a further round of training: a folder, or a LoRA of smpo-train on top of the
    reference; default: the reference."""
    resolution: Annotated[int | None, Flag(metavar="PIXELS"), Field(ge=8)] = None
    """Side of the images. Default: the model's native resolution."""

    @property
    def inverting_unet(self) -> Path | None:
        """See ``sampling_unet``; the name is that of `invert`."""
        return self.sampling_unet


class StepDrawOptions(Options):
    """The sampler's steps, and the pairs of their draws."""

    model_config = ConfigDict(title="Steps and pairs")

    steps: Annotated[int, Field(ge=1)] = 20
    """Steps of the sampler, DDIM's or stochastic Euler's."""
    eta: float = 1.0
    """Noise of a step, as a multiple of the standard deviation of DDIM's posterior: above 0, at most 1; 1 for flow
    models."""
    trained: Annotated[
        tuple[int, ...] | None,
        PlainValidator(_trained),
        PlainSerializer(lambda steps: steps and ",".join(map(str, steps))),
        Flag(typed=str, metavar="N,N,..."),
    ] = None
    """Steps that give pairs, by number: 1 is the last step of sampling. Default: every fourth, 20,16,12,8,4 of 20."""
    candidates: Annotated[int, Field(ge=2)] = 2
    """Draws of a trained step; the best and the worst are its pair."""
    continue_from: Literal["winner", "random"] = "winner"
    """Which draw the trajectory continues from: the best one (TailorPO), or a random one (SPO)."""
    trajectories: Annotated[int, Field(ge=1)] = 1
    """Trajectories per prompt, each from noise of its own."""
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    """Classifier-free guidance of sampling, 1 is none. Training uses none."""
    gap: Annotated[float, Field(ge=0)] = 0.0
    """Largest difference of the rewards that is a tie: label 0.5, which --objective dpo leaves out."""
    gradient_guidance: bool = False
    """Move the best draw of a trained step along the reward's gradient, if that raises its reward (TailorPO-G); for
    pickscore, clipscore and aesthetic, or your own reward with score_tensor. One more forward, and a backward through
    denoiser and VAE."""
    gradient_delta: Annotated[float | None, Field(gt=0)] = None
    """With --gradient-guidance: rise of the reward that a draw is moved towards, in its unit. Default: 0.5; 0.005 for
    rewards that are a cosine."""
    embedded_guidance: Annotated[float | None, Field(ge=0)] = None
    """Guidance scale that a guidance-distilled model (FLUX.1-dev) is told, here and in training. Default: 1."""
    sampler_steps: ClassVar[int | None] = None
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed; all randomness depends on it, the prompt, the number of its trajectory, the step and the draw alone."""

    @model_validator(mode="after")
    def _refuse_unused_delta(self) -> Self:
        if self.gradient_delta is not None and not self.gradient_guidance:
            raise UserError(f"--gradient-delta {self.gradient_delta:g}: it is of --gradient-guidance; give that, too")
        return self


class StepStorageOptions(Options):
    """Settings of what is stored."""

    model_config = ConfigDict(title="What is stored")

    empty_prompt: ClassVar[Literal["model"]] = "model"

    storage: Literal["float16", "bfloat16"] = "float16"
    """Dtype of stored latents and noise: float16 (11 bits of precision, up to 65504) or bfloat16 (8 bits)."""
    text: Literal["auto", "stored", "live"] = "auto"
    """stored: encode each prompt once, before sampling, and store its embeddings for sampling and training. live:
    encode prompts where they are needed. auto: stored, except for Stable Diffusion 1.x, 2.x and XL."""
    prompts_per_shard: Annotated[int, Field(ge=1)] = 32
    """Prompts per shard; a shard is also the unit of work."""


class StepJobOptions(JobOptions):
    """Settings of the job."""

    batch_size: Annotated[
        AutoBatchSize,
        Field(
            description="Trajectories per model call, or auto: the largest batch that fits on the GPU; on CPU the "
            "smallest whose doubling gains less than 5 %. A trained step computes all draws of a batch at once."
        ),
    ] = 8
    dtype: ModelDtype = None
    concurrency: Concurrency = None
    limit: Annotated[int | None, Field(ge=1)] = None
    """Use only the first N prompts."""
    max_reject_rate: MaxRejectRate = 0.05


class StepsOptions(Options):
    """The flags of ``steps``."""

    models: StepModelOptions
    prompts: Annotated[ExistingPathOrUrl, Flag(typed=str, metavar="FILE|URL", place=True)]
    """Prompts: .txt with one per line, or .json, .jsonl, .csv, .tsv or .parquet with a column prompt, prompts or
    caption. A repeated prompt is taken once."""
    reward: OneReward
    out: OutOrUrl
    trajectory: StepDrawOptions = StepDrawOptions()
    storing: StepStorageOptions = StepStorageOptions()
    running: StepJobOptions = StepJobOptions()

    @property
    def settings(self) -> InversionSettings:
        """The settings that the manifest records; the default of dtype depends on the device.

        ``--text auto`` counts as live: see :func:`smpo_pipeline.jobs.invert.models.choose_text`.
        """
        from smpo_models.devices import default_dtype  # noqa: PLC0415  (torch: not for --help)

        drawn = self.trajectory
        dtype: Dtype = self.running.dtype or default_dtype(self.running.chosen_device)
        return InversionSettings(
            source="steps",
            timesteps="grid",
            steps=drawn.steps,
            eta=drawn.eta,
            guidance_scale=drawn.guidance_scale,
            trajectories=drawn.trajectories,
            prompt_dropout=0.0,
            hflip=False,
            storage=self.storing.storage,
            text="stored" if self.storing.text == "stored" else "live",
            dtype=dtype,
        )

    def choices(self, side: int, trained: list[int], prompts: int) -> str:
        """Describe the job for the user: numbers, and what was chosen by default."""
        drawn, running = self.trajectory, self.running
        pairs = f"{prompts} prompts x {drawn.trajectories} x {len(trained)} pairs at {side} x {side} pixels"
        steps = f"steps {','.join(map(str, trained))} of {drawn.steps}, guidance scale {drawn.guidance_scale:g}"
        batches = batches_in_words(running.batch_size, "trajectories")
        return f"{pairs}; {steps}; {running.device}, {self.settings.dtype}; {batches}; seed {drawn.seed}"
