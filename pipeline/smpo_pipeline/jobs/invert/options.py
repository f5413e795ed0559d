"""What ``smpo-pipeline invert`` is told: its flags. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, flag_name
from smpo_pipeline.options import (
    FOLDER_OR_URL,
    AutoBatchSize,
    ColumnOptions,
    ExistingPath,
    ExistingPathOrUrl,
    JobOptions,
    ModelDtype,
    ModelSource,
    OutOrUrl,
    Pairs,
    Variant,
)
from smpo_schemas.inversion_settings import InversionSettings, averaged_estimates

_DEFAULTS = InversionSettings()
_TOLERANCE = {"fp32": _DEFAULTS.tolerance, "fp16": 3e-4, "bf16": 2e-3}
"""A few times the rounding of the denoiser's output, below which no residual falls (docs/guide/inversion.md)."""

_SOLVERS_OF_FLAG = {
    "solver": ("ddim", "renoise", "adaptive", "anderson"),
    "renoise_steps": ("renoise",),
    "renoise_average": ("renoise",),
    "tolerance": ("adaptive", "anderson"),
    "max_evaluations": ("adaptive", "anderson"),
    "anderson_depth": ("anderson",),
}
_FLAGS_OF_TRAJECTORIES = ("start", "eta", "guidance_scale", "inverting_unet")
"""Flags that no state of ``--source forward`` depends on, besides those of the solvers."""

_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


def _start(given: Any) -> Any:  # noqa: ANN401  (a timestep, or what a user typed)
    if given in ("clean", "level0") or isinstance(given, int):
        return given
    if given.isdecimal():
        return int(given)
    raise UserError(f"--start {given}: clean, level0, or a timestep")


def _states(given: Any) -> int | None:  # noqa: ANN401  (a number, or what a user typed)
    if given in (None, "all"):
        return None
    if str(given).isdecimal() and int(given) > 0:
        return int(given)
    raise UserError(f"--states {given}: all, or a number from 1")


def _bytes(given: Any) -> int | None:  # noqa: ANN401  (a number, or what a user typed)
    if given is None or isinstance(given, int):
        return given
    number, unit = given[:-2], given[-2:]
    if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
        raise UserError(f"--shard-size {given}: a whole number with kB, MB, GB, as in 500MB")
    return int(number) * _UNITS[unit]


def _as_size(count: int | None) -> str | None:
    """Bytes as :func:`_bytes` takes them."""
    if count is None:
        return None
    unit = next(name for name, size in _UNITS.items() if count % size == 0)
    return f"{count // _UNITS[unit]}{unit}"


class ModelOptions(Options):
    """The model, and what stands in for its parts."""

    model_config = ConfigDict(title="Model")

    model: Annotated[ModelSource, Flag(place=True)]
    """Text-to-image model to align: hub id or diffusers folder."""
    unet: ExistingPath | None = None
    """The reference, where it is not the model's own denoiser."""
    inverting_unet: ExistingPath | None = None
    """Denoiser that carries the images along, for a second round: a folder, or a LoRA of smpo-train on top of the
    reference; default: the reference."""
    vae: Annotated[ModelSource | None, Flag(place=True)] = None
    """VAE in place of the model's own: hub id or folder."""
    variant: Variant = None
    resolution: Annotated[int | None, Field(ge=8)] = None
    """Side of the square images in pixels; default: the model's."""
    buckets: Annotated[bool, Flag(off="--no-buckets")] = _DEFAULTS.buckets
    """Bring each pair to one of several sizes of about that area, by its aspect ratio, not to the square."""
    size_conditioning: Literal["image", "constant"] = "image"
    """What SDXL is told: each image's own size and crop, or the resolution and no crop (published code)."""


class TrajectoryOptions(Options):
    """Where the states come from."""

    model_config = ConfigDict(title="Trajectories")

    source: Literal["renoise", "forward"] = "renoise"
    """renoise: the model's own trajectory; forward: Gaussian noise (Diffusion-DPO's estimate)."""
    forward_noise: Literal["pair", "image"] = "pair"
    """Of --source forward: one noise for both images of a pair, or one an image (CaPO)."""
    steps: Annotated[int, Field(ge=1)] = _DEFAULTS.steps
    """Steps of a trajectory, and so its states."""
    timesteps: Literal["jittered", "grid", "published"] = "jittered"
    """jittered: one uniform draw a stratum; grid: the scheduler's; published: as the published code, a grid state at or
    above a uniform t, used as if at t."""
    start: Annotated[Literal["clean", "level0"] | int, PlainValidator(_start), Flag(typed=str)] = _DEFAULTS.start
    """clean: from x0; level0: from x0 noised to the first level; a timestep T: nodes up to T by noising."""
    eta: Annotated[float, Field(ge=0)] = _DEFAULTS.eta
    """Noise after each step, in DDIM posterior std (DDIM-InPO: 0.1)."""
    guidance_scale: Annotated[float, Field(ge=0)] = _DEFAULTS.guidance_scale
    """Guidance of the inverting denoiser; 1: none."""
    trajectories: Annotated[int, Field(ge=1)] = _DEFAULTS.trajectories
    """Trajectories a pair, each with draws of its own."""
    seed: Annotated[int, Field(ge=0)] = 0
    """With the pair's id, the source of all randomness."""


class SolverOptions(Options):
    """How a step of a trajectory is solved."""

    model_config = ConfigDict(title="Solver of a step")

    solver: Literal["ddim", "renoise", "adaptive", "anderson"] = "renoise"
    """None (ddim), iterations by number (renoise), or until converged (adaptive, anderson)."""
    renoise_steps: Annotated[int, Field(ge=0)] = _DEFAULTS.renoise_steps
    """ReNoise iterations a step, one forward each; 0: DDIM inversion."""
    renoise_average: str = _DEFAULTS.renoise_average
    """ReNoise estimates that are averaged: lastN, all, or their numbers (0,1)."""
    tolerance: Annotated[float | None, Field(ge=1e-09)] = None
    """Of adaptive and anderson: the residual (relative) at which an image's step is done; default: 1e-4 in fp32, 3e-4
    in fp16, 2e-3 in bf16."""
    max_evaluations: Annotated[int, Field(ge=1)] = _DEFAULTS.max_evaluations
    """Of adaptive and anderson: forwards after which a step ends as it is."""
    anderson_depth: Annotated[int, Field(ge=1, le=8)] = _DEFAULTS.anderson_depth
    """Of anderson: differences that it looks back on."""


class StorageOptions(Options):
    """What of the trajectories is stored, and how."""

    model_config = ConfigDict(title="What is stored")

    states: Annotated[int | None, PlainValidator(_states), Flag(typed=str)] = None
    """States stored a trajectory: a number drawn from them, or all. Default: all."""
    vae_latent: Literal["sample", "mode"] = "sample"
    """sample or mode of the VAE's posterior."""
    prompt_dropout: Annotated[float, Field(ge=0, le=1)] = _DEFAULTS.prompt_dropout
    """Share of trajectories under the empty prompt."""
    empty_prompt: Literal["model", "encoded"] = "model"
    """What a dropped prompt is. model: what the model's own pipeline guides with, zeros for SDXL. encoded: what the
    text encoders make of an empty text (published code). The trainer does as the shards say."""
    hflip: Annotated[bool, Flag(off="--no-hflip")] = _DEFAULTS.hflip
    """Mirror half of the trajectories."""
    storage: Literal["float16", "bfloat16"] = "float16"
    """Of stored latents and noise: float16 (11 bits of each value, up to 65504) or bfloat16 (8, any size)."""
    pairs_per_shard: Annotated[int, Field(ge=1)] = 128
    """Pairs a tar, and a unit of work."""
    shard_size: Annotated[
        int | None, PlainValidator(_bytes), PlainSerializer(_as_size), Flag(typed=str, metavar="BYTES")
    ] = None
    """Size of a tar in place of --pairs-per-shard: 500MB, 1GB (about)."""

    @model_validator(mode="after")
    def _refuse_two_sizes(self) -> Self:
        if self.shard_size is not None and self.was_typed("pairs_per_shard"):
            given = f"--shard-size {_as_size(self.shard_size)} and --pairs-per-shard"
            raise UserError(f"{given} both say how large a tar is; give one of them")
        return self


class InvertJobOptions(JobOptions):
    """How the job runs."""

    batch_size: AutoBatchSize = 16
    dtype: ModelDtype = None
    concurrency: Annotated[int | None, Field(ge=1)] = None
    """Model actors at once, at the most; one GPU each, or one core. Default: one a GPU, or a core."""


class InversionOptions(Options):
    """The flags that decide what an inversion makes and costs."""

    pairs: Pairs
    models: ModelOptions
    trajectory: TrajectoryOptions = TrajectoryOptions()
    solving: SolverOptions = SolverOptions()
    storing: StorageOptions = StorageOptions()
    columns: ColumnOptions = ColumnOptions()
    running: InvertJobOptions = InvertJobOptions()

    @property
    def settings(self) -> InversionSettings:
        """What a manifest says of these flags; those that have no default of their own follow from the device."""
        groups = (self.models, self.trajectory, self.solving, self.storing, self.running)
        flags = {name: value for group in groups for name, value in group}
        from smpo_models.devices import default_dtype  # noqa: PLC0415  (torch: not for --help)

        dtype = self.running.dtype or default_dtype(self.running.chosen_device)
        flags |= {"dtype": dtype, "tolerance": self.solving.tolerance or _TOLERANCE[dtype]}
        return InversionSettings(**{name: flags[name] for name in InversionSettings.model_fields})

    def choices(self, resolution: int, pairs: int) -> list[str]:
        """Describe the job for the user: its pairs and the settings that were chosen by default."""
        settings, batch_size = self.settings, self.running.batch_size
        size = f"{resolution} x {resolution}" + (", by aspect ratio" if settings.buckets else "")
        batches = "found by trying" if batch_size is None else f"of {batch_size} trajectories"
        emptied, mirrored = f"{100 * settings.prompt_dropout:g} %", f"{100 * settings.hflip / 2:g} %"
        computing = f"{self.running.device}, {settings.dtype}; batches {batches}"
        return [
            f"{pairs} pairs at {size} pixels; {computing}; seed {self.trajectory.seed}",
            f"of the trajectories {emptied} are without their prompt (--prompt-dropout), {mirrored} mirrored (--hflip)",
        ]

    @model_validator(mode="after")
    def _refuse_unused_flags(self) -> Self:
        """Refuse flags on the command line that this solver, or a run without trajectories, does not look at."""
        solver = self.solving.solver if self.trajectory.source == "renoise" else None
        for name, solvers in _SOLVERS_OF_FLAG.items():
            if self.was_typed(name) and solver not in solvers:
                used = (
                    "--source forward makes no trajectory" if solver is None else f"--solver {solver} does not use it"
                )
                raise UserError(f"{flag_name(name)}: {used}; it is for --solver {' and '.join(solvers)}")
        for name in _FLAGS_OF_TRAJECTORIES:
            if self.was_typed(name) and solver is None:
                raise UserError(f"{flag_name(name)}: --source forward makes no trajectory; it is for --source renoise")
        if self.was_typed("forward_noise") and solver is not None:
            raise UserError("--forward-noise: --source renoise makes trajectories; it is for --source forward")
        averaged_estimates(self.solving.renoise_average, self.solving.renoise_steps)
        return self


class InvertOptions(InversionOptions):
    """The settings of ``invert``."""

    scores: Annotated[ExistingPathOrUrl, FOLDER_OR_URL]
    """Output of `smpo-pipeline score` for these pairs."""
    out: OutOrUrl
