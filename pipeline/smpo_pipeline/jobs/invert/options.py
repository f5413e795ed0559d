"""The flags of ``smpo-pipeline invert``. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, flag_name
from smpo_pipeline.options import (
    FOLDER_OR_URL,
    AutoBatchSize,
    ColumnOptions,
    Concurrency,
    ExistingPath,
    ExistingPathOrUrl,
    JobOptions,
    ModelDtype,
    ModelSource,
    OutOrUrl,
    Pairs,
    Variant,
    batches_in_words,
)
from smpo_schemas.inversion_settings import GENERATED, InversionSettings, averaged_estimates

_DEFAULTS = InversionSettings()
_TOLERANCE = {"fp32": _DEFAULTS.tolerance, "fp16": 3e-4, "bf16": 2e-3}
"""A few times the rounding error of the denoiser's output, below which no residual falls (docs/guide/inversion.md)."""

_SOLVERS_OF_FLAG = {
    "solver": ("ddim", "renoise", "adaptive", "anderson"),
    "renoise_steps": ("renoise",),
    "renoise_average": ("renoise",),
    "tolerance": ("adaptive", "anderson"),
    "max_evaluations": ("adaptive", "anderson"),
    "anderson_depth": ("anderson",),
}
_SOURCES_OF_FLAG: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("start", "eta"), ("renoise",)),
    "guidance_scale": ("renoise", "truncated"),
    "inverting_unet": ("renoise", *GENERATED),
    "forward_noise": ("forward",),
    "candidates": GENERATED,
    "steps": ("renoise", "forward", "tracked", "truncated"),
    "timesteps": ("renoise", "forward", "tracked"),
    **dict.fromkeys(("truncated_steps", "truncated_from"), ("truncated",)),
    **dict.fromkeys(("buckets", "hflip", "vae_latent"), ("renoise", "forward", "truncated")),
}
"""Flags besides those of the solvers that not every source uses."""

_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


def _start(value: Any) -> Any:  # noqa: ANN401  (a timestep, or a user's string)
    if value in ("clean", "level0") or isinstance(value, int):
        return value
    if value.isdecimal():
        return int(value)
    raise UserError(f"--start {value}: expected clean, level0, or a timestep")


def _states(value: Any) -> int | None:  # noqa: ANN401  (a number, or a user's string)
    if value in (None, "all"):
        return None
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise UserError(f"--states {value}: expected all, or a number from 1")


def _bytes(value: Any) -> int | None:  # noqa: ANN401  (a number, or a user's string)
    if value is None or isinstance(value, int):
        return value
    number, unit = value[:-2], value[-2:]
    if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
        raise UserError(f"--shard-size {value}: expected a whole number with kB, MB or GB, for example 500MB")
    return int(number) * _UNITS[unit]


def _as_size(count: int | None) -> str | None:
    """Format bytes as :func:`_bytes` parses them."""
    if count is None:
        return None
    unit = next(name for name, size in _UNITS.items() if count % size == 0)
    return f"{count // _UNITS[unit]}{unit}"


class AlignedModelOptions(Options):
    """The model to align, and replacements for its parts."""

    model_config = ConfigDict(title="Model")

    model: Annotated[ModelSource, Flag(place=True)]
    """Text-to-image model to align: hub id or diffusers folder."""
    unet: ExistingPath | None = None
    """Folder of the reference denoiser, if it is not the model's own."""
    vae: Annotated[ModelSource | None, Flag(place=True)] = None
    """VAE to use instead of the model's own: hub id or folder."""
    variant: Variant = None


class ModelOptions(AlignedModelOptions):
    """The model to align, the denoiser that inverts, and the size of images."""

    inverting_flag: ClassVar[str] = "--inverting-unet"

    inverting_unet: ExistingPath | None = None
    """Denoiser that inverts the images, for a second round of training: a folder, or a LoRA of smpo-train on top of the
    reference; default: the reference."""
    resolution: Annotated[int | None, Field(ge=8)] = None
    """Side of the square images in pixels; default: the model's."""
    buckets: Annotated[bool, Flag(off="--no-buckets")] = _DEFAULTS.buckets
    """Resize each pair to one of several sizes of about that area, by its aspect ratio, instead of the square."""
    size_conditioning: Literal["image", "constant"] = "image"
    """SDXL's size and crop conditioning: each image's own, or the resolution without a crop (published code)."""


class TrajectoryOptions(Options):
    """Settings of the trajectories."""

    model_config = ConfigDict(title="Trajectories")

    source: Literal["renoise", "forward", "tracked", "sampled", "truncated"] = "renoise"
    """renoise: invert along the model's sampling trajectory; forward: add Gaussian noise (Diffusion-DPO's estimate).
    For images from generate --keep, tracked: add the noise that an image was made from (PNAPO); sampled: take the
    sampler's own states. truncated: a few steps of the model's own sampling, for --objective selfnpo."""
    candidates: Annotated[tuple[ExistingPathOrUrl, ...], Flag(typed=list[str], metavar="DIR|URL", place=True)] = ()
    """With --source tracked or sampled: outputs of generate --keep with the pairs' latents. Default: the folder of
    --pairs, or what select made the pairs from."""
    forward_noise: Literal["pair", "image"] = "pair"
    """With --source forward: the same noise for both images of a pair, or different noise (CaPO)."""
    truncated_steps: Annotated[int, Field(ge=0)] = _DEFAULTS.truncated_steps
    """With --source truncated: the sampler's steps before x0 is estimated."""
    truncated_from: Literal["image", "noise"] = _DEFAULTS.truncated_from
    """With --source truncated: begin at the image, noised to a random one of the sampler's timesteps (published code),
    or at pure noise (the paper's text)."""
    steps: Annotated[int | None, Field(ge=1)] = None
    """Steps per trajectory; each gives one state. With --source truncated: steps of the sampler's whole grid. Default:
    9; truncated: 25."""
    timesteps: Literal["jittered", "grid", "published"] = "jittered"
    """jittered: one uniform draw per stratum; grid: the scheduler's timesteps; published: as in the published code, the
    grid state at or above a uniform t, used as if it were at t."""
    start: Annotated[Literal["clean", "level0"] | int, PlainValidator(_start), Flag(typed=str)] = _DEFAULTS.start
    """Start of the inversion. clean: x0; level0: x0 noised to the first noise level; a timestep T: states up to T are
    made by adding noise."""
    eta: Annotated[float, Field(ge=0)] = _DEFAULTS.eta
    """Noise added after each step, as a multiple of DDIM's posterior standard deviation (DDIM-InPO: 0.1)."""
    guidance_scale: Annotated[float | None, Field(ge=0)] = None
    """Classifier-free guidance of the inverting denoiser; 1: none, 0: without the prompt. Default: 1; with --source
    truncated 0 (published code)."""
    embedded_guidance: Annotated[float | None, Field(ge=0)] = None
    """Guidance scale that a guidance-distilled model (FLUX.1-dev) is told, here and in training. Default: 1."""
    sampler_steps: Annotated[int | None, Field(ge=1)] = None
    """Number of sampling steps that the timesteps are for; only for flow models whose schedule depends on it
    (Qwen-Image, FLUX.2-klein). Default: the model's usual number."""
    trajectories: Annotated[int, Field(ge=1)] = _DEFAULTS.trajectories
    """Trajectories per pair, each with its own random draws."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed; all randomness depends on it and the pair's id alone."""


class SolverOptions(Options):
    """Settings of the solver."""

    model_config = ConfigDict(title="Solver of a step")

    solver: Literal["ddim", "renoise", "adaptive", "anderson"] = "renoise"
    """ddim: no iterations; renoise: a fixed number; adaptive, anderson: until converged."""
    renoise_steps: Annotated[int, Field(ge=0)] = _DEFAULTS.renoise_steps
    """ReNoise iterations per step, one forward each; 0: DDIM inversion."""
    renoise_average: str = _DEFAULTS.renoise_average
    """ReNoise estimates to average: lastN, all, or their numbers, for example 0,1."""
    tolerance: Annotated[float | None, Field(ge=1e-09)] = None
    """For adaptive and anderson: relative residual at which a step of an image has converged; default: 1e-4 in fp32,
    3e-4 in fp16, 2e-3 in bf16."""
    max_evaluations: Annotated[int, Field(ge=1)] = _DEFAULTS.max_evaluations
    """For adaptive and anderson: maximum number of forwards per step, converged or not."""
    anderson_depth: Annotated[int, Field(ge=1, le=8)] = _DEFAULTS.anderson_depth
    """For anderson: number of previous differences it uses."""


class StorageOptions(Options):
    """Settings of what is stored."""

    model_config = ConfigDict(title="What is stored")

    states: Annotated[int | None, PlainValidator(_states), Flag(typed=str)] = None
    """States to store per trajectory: a number, drawn at random, or all. Default: all; with --source truncated, which
    makes as many as it is asked for, 9."""
    vae_latent: Literal["sample", "mode"] = "sample"
    """Latents: sample or mode of the VAE's posterior."""
    prompt_dropout: Annotated[float, Field(ge=0, le=1)] = _DEFAULTS.prompt_dropout
    """Share of the trajectories that get the empty prompt."""
    empty_prompt: Literal["model", "encoded"] = "model"
    """Embedding of the empty prompt. model: the one that the model's pipeline uses for guidance, zeros for SDXL.
    encoded: the text encoders' output for an empty text (published code). The trainer uses the same."""
    hflip: Annotated[bool, Flag(off="--no-hflip")] = _DEFAULTS.hflip
    """Mirror the images of half of the trajectories."""
    storage: Literal["float16", "bfloat16"] = "float16"
    """Dtype of stored latents and noise: float16 (11 bits of precision, up to 65504) or bfloat16 (8 bits)."""
    text: Literal["auto", "stored", "live"] = "auto"
    """stored: encode each distinct prompt once, before the pairs, and store its embeddings, so that neither this stage
    nor the trainer holds the text encoders any longer. live: encode prompts where they are needed. auto: stored,
    except for Stable Diffusion 1.x, 2.x and XL."""
    pairs_per_shard: Annotated[int, Field(ge=1)] = 128
    """Pairs per shard; a shard is also the unit of work."""
    shard_size: Annotated[
        int | None, PlainValidator(_bytes), PlainSerializer(_as_size), Flag(typed=str, metavar="BYTES")
    ] = None
    """Approximate size of a shard, for example 500MB or 1GB, instead of --pairs-per-shard."""

    @model_validator(mode="after")
    def _refuse_two_sizes(self) -> Self:
        if self.shard_size is not None and self.was_typed("pairs_per_shard"):
            given = f"--shard-size {_as_size(self.shard_size)} and --pairs-per-shard"
            raise UserError(f"{given} both set the size of a shard; give only one")
        return self


class InvertJobOptions(JobOptions):
    """Settings of the job."""

    batch_size: AutoBatchSize = 16
    dtype: ModelDtype = None
    concurrency: Concurrency = None


class InversionOptions(Options):
    """The flags that `invert` and `plan` share."""

    pairs: Pairs
    models: ModelOptions
    trajectory: TrajectoryOptions = TrajectoryOptions()
    solving: SolverOptions = SolverOptions()
    storing: StorageOptions = StorageOptions()
    columns: ColumnOptions = ColumnOptions()
    running: InvertJobOptions = InvertJobOptions()

    @property
    def settings(self) -> InversionSettings:
        """The settings that the manifest records; defaults of dtype and tolerance depend on the device.

        ``--text auto`` counts as live: see :func:`smpo_pipeline.jobs.invert.models.choose_text`.
        """
        groups = (self.models, self.trajectory, self.solving, self.storing, self.running)
        # What is None has a default that depends on the source.
        flags = {name: value for group in groups for name, value in group if value is not None}
        from smpo_models.devices import default_dtype  # noqa: PLC0415  (torch: not for --help)

        dtype = self.running.dtype or default_dtype(self.running.chosen_device)
        flags |= {"dtype": dtype, "tolerance": self.solving.tolerance or _TOLERANCE[dtype]}
        flags["text"] = "stored" if self.storing.text == "stored" else "live"
        # Kept latents cannot be mirrored, and kept states have the sampler's timesteps.
        flags |= {"hflip": False} if self.trajectory.source in GENERATED else {}
        flags |= {"timesteps": "grid"} if self.trajectory.source in ("sampled", "truncated") else {}
        return InversionSettings(**{name: flags[name] for name in InversionSettings.model_fields if name in flags})

    def choices(self, resolution: int, pairs: int) -> list[str]:
        """Describe the job for the user: number of pairs, and the settings that were chosen by default."""
        settings = self.settings
        size = f"{resolution} x {resolution}" + (", by aspect ratio" if settings.buckets else "")
        batches = batches_in_words(self.running.batch_size, "trajectories")
        dropped, mirrored = f"{100 * settings.prompt_dropout:g} %", f"{100 * settings.hflip / 2:g} %"
        computing = f"{self.running.device}, {settings.dtype}; {batches}"
        return [
            f"{pairs} pairs at {size} pixels; {computing}; seed {self.trajectory.seed}",
            f"{dropped} of the trajectories without their prompt (--prompt-dropout), {mirrored} mirrored (--hflip)",
            *(["each prompt's embeddings are stored once (--text stored)"] if settings.text == "stored" else []),
        ]

    @model_validator(mode="after")
    def _refuse_unused_flags(self) -> Self:
        """Refuse flags on the command line that the source or solver does not use; a config file may have them."""
        source, values = self.trajectory.source, self.flat_values()
        solver = self.solving.solver if source == "renoise" else None
        for name, solvers in _SOLVERS_OF_FLAG.items():
            if self.was_typed(name) and solver not in solvers:
                chosen = f"--source {source}" if solver is None else f"--solver {solver}"
                raise UserError(f"{flag_name(name)}: {chosen} does not use it; only --solver {', '.join(solvers)}")
        for name, sources in _SOURCES_OF_FLAG.items():
            # A switch that is off asks for nothing.
            if self.was_typed(name) and values[name] is not False and source not in sources:
                raise UserError(
                    f"{flag_name(name)}: --source {source} does not use it; only --source {', '.join(sources)}"
                )
        if source == "truncated" and self.was_typed("states") and self.storing.states is None:
            raise UserError("--states all: --source truncated has as many as are asked for; give a number")
        averaged_estimates(self.solving.renoise_average, self.solving.renoise_steps)
        return self


class InvertOptions(InversionOptions):
    """The flags of ``invert``."""

    scores: Annotated[ExistingPathOrUrl | None, FOLDER_OR_URL] = None
    """Output directory of `smpo-pipeline score` for these pairs; pairs without scores are rejected. Default: shards
    without scores, for objectives that learn from labels."""
    out: OutOrUrl

    def choices(self, resolution: int, pairs: int) -> list[str]:
        """See the base class."""
        without = "the shards have no scores (--scores): objectives that learn from rewards need smpo-train --scores"
        return [*super().choices(resolution, pairs), *([] if self.scores else [without])]
