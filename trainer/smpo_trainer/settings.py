"""The settings of a training run, each one a flag of ``smpo-train``.

Nothing heavy is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, Overwrite
from smpo_schemas.dtypes import Dtype
from smpo_trainer.named_values import (
    parse_options,
    parse_ranges,
    parse_rewards,
    write_options,
    write_ranges,
    write_rewards,
)
from smpo_trainer.presets import PICKSCORE_RANGE, PRESETS, find_preset

Device = Literal["cpu", "cuda"]
ReferenceSource = Literal["auto", "stored", "recomputed", "live"]
TextSource = Literal["live", "cache"]
TimestepWeightingKind = Literal["uniform", "min-snr", "sigmoid"]
LrSchedule = Literal["constant", "linear", "cosine"]
OptimizerName = Literal["adamw", "adafactor", "adamw8bit"]

DEFAULT_LR = 1e-5
DEFAULT_LORA_LR = 1e-4

MAX_SEED = 2**32 - 1
"""The largest that numpy takes."""

MAX_CACHE_GIB = 2.0**30
"""An exbibyte."""


class RewardOptions(Options):
    """From the scores of images to P(image_0 preferred) of a pair."""

    model_config = ConfigDict(title="Rewards and preference")

    reward: Annotated[
        dict[str, float],
        BeforeValidator(parse_rewards),
        PlainSerializer(write_rewards),
        Flag(typed=list[str], metavar="NAME[:WEIGHT]"),
    ] = Field(default_factory=dict)
    """Reward to prefer by, weight 1 if none is given; several are mixed. May be left out if there is only one."""
    preference: str = "minmax"
    """From rewards to P(image_0 preferred). minmax: sigmoid of the weighted sum of their differences, each scaled by
    max - min over the data set. mixture: weighted mean of their sigmoids, scaled by a --calibration. winrate:
    difference of how often each image beats the other images of its prompt (CaPO); needs --scores."""
    calibration: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Output of `smpo-pipeline calibrate`, for mixture and winrate: each reward's temperature, and its weight if no
    --reward is given."""
    reward_range: Annotated[
        dict[str, tuple[float, float]],
        BeforeValidator(parse_ranges),
        PlainSerializer(write_ranges),
        Flag(typed=list[str], metavar="NAME=MIN:MAX|raw"),
        Field(
            description="Scale of a reward for minmax and winrate, in units of its raw score, in place of the data "
            "set's minimum and maximum; raw for a reward that is log-odds. Published by SmPO for PickScore: "
            f"{PICKSCORE_RANGE}."
        ),
    ] = Field(default_factory=dict)
    scores: Annotated[Path | None, Flag(metavar="DIR")] = None
    """Output of `smpo-pipeline score` to use in place of the shards' scores, joined by pair_id and prompt."""
    weight_column: Annotated[str | None, Flag(metavar="NAME")] = None
    """Column with a weight for each pair, in the Parquet files of the table that --scores names. A pair without a
    weight is left out."""


class LossOptions(Options):
    """The loss of a pair, and what is combined with it."""

    model_config = ConfigDict(title="Objective")

    objective: str = "smpo"
    """Loss: smpo (smoothed preferences of rewards), dpo (labels), ipo, capo, dmpo, mapo, npo or sft, or your own as
    MODULE:CLASS; see --list-objectives."""
    # One repeatable flag: a flag for each option would make --help import every objective, and so torch.
    objective_option: Annotated[
        dict[str, str],
        BeforeValidator(parse_options),
        PlainSerializer(write_options),
        Flag(typed=list[str], metavar="NAME=VALUE"),
    ] = Field(default_factory=dict)
    """An option that only this objective has, such as label_smoothing=0.1 of dpo; see --list-objectives."""
    beta: Annotated[float | None, Field(ge=0)] = None
    """Scale of the implicit reward (times half the mean squared error). Larger stays closer to the reference. Default:
    as published, 2000 for SD 1.x and 2.x, 5000 for SDXL; npo 1000 and 2000; dmpo 2000 and 6000."""
    gamma: Annotated[float, Field(ge=0)] = 10.0
    """Scale of the smoothed preference: p counts as gamma (2p - 1)."""
    timestep_weighting: TimestepWeightingKind | None = None
    """How much a state counts by its timestep: its errors are multiplied by 1, or by weights that fall with the
    signal-to-noise ratio (min-snr, sigmoid). Default: as published; sigmoid for capo, uniform for the rest."""
    snr_gamma: Annotated[float, Field(ge=0)] = 5.0
    """For --timestep-weighting min-snr: the SNR from which weights fall."""
    sigmoid_bias: float | None = None
    """For --timestep-weighting sigmoid: the log SNR at which the weight is 1/2. Default: 1.5 for capo, 0 for the
    rest."""
    budget: Annotated[float | None, Field(ge=0)] = None
    """How far the preferred image's error may rise above the reference's (times beta/2: in margin units) before the
    excess is added to the loss. Default: unlimited."""
    budget_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the excess over --budget."""


class StepOptions(Options):
    """How many steps there are, and how many pairs a step takes."""

    model_config = ConfigDict(title="Steps")

    max_steps: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps. With a larger number the same command continues a finished run."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Pairs (states) that one device takes at once; a forward has twice as many rows."""
    grad_accum: Annotated[int, Field(ge=1)] = 1
    """Batches that make one optimizer step. The published runs take 1024 pairs a step over all devices."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of the order of the states and of a new adapter."""
    max_skipped: Annotated[int, Field(ge=1)] = 5
    """A step whose loss or gradient is not finite is skipped and counted; so many in a row end the run."""


class OptimizerOptions(Options):
    """From a gradient to new weights."""

    model_config = ConfigDict(title="Optimizer")

    optimizer: OptimizerName = "adamw"
    """adamw (fused); adafactor, which needs half its memory or less; adamw8bit, on a GPU with bitsandbytes."""
    lr: Annotated[float | None, Field(ge=0)] = None
    """Peak learning rate. Default: 1e-5, with --lora-rank 1e-4."""
    scale_lr: Annotated[bool, Flag(off="--no-scale-lr")] = False
    """Multiply --lr by the pairs of an optimizer step: devices x --batch-size x --grad-accum."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Optimizer steps over which the learning rate rises from 0."""
    lr_schedule: LrSchedule = "constant"
    """Course of the learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay, per unit of learning rate."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Scale the gradient down to this norm; 0: never."""
    ema_decay: Annotated[float | None, Field(ge=0, le=1)] = None
    """Keep a moving average of the weights with this decay, such as 0.999, and save it as the result; held-out pairs
    and validation images are of it too. Default: none."""


class DenoiserOptions(Options):
    """Which weights are trained, and from where they start."""

    model_config = ConfigDict(title="Denoiser")

    lora_rank: Annotated[int | None, Field(ge=1)] = None
    """Train an adapter of this rank on the attention projections; default: all weights."""
    unet: Annotated[Path | None, Flag(metavar="DIR")] = None
    """Start from this denoiser folder; needed if the model's own is not the shards' reference."""
    variant: Annotated[str | None, Flag(metavar="NAME")] = None
    """Variant of the model's weight files, for example fp16. Default: those without one, or the only one there is."""


class ComputeOptions(Options):
    """Where and how the numbers are computed."""

    model_config = ConfigDict(title="Device, precision and memory")

    device: Device | None = None
    """What to train on. Default: a GPU if torch sees one, otherwise the CPU."""
    dtype: Dtype | None = None
    """Dtype of forward and backward; weights and optimizer stay in fp32. Default: that of the run that is
    continued; or what `accelerate launch` or its config file says; otherwise bf16 on a GPU that supports it and fp32
    elsewhere."""
    tf32: bool = False
    """On NVIDIA GPUs, multiply float32 matrices, and convolve, in TF32: faster, to about three digits."""
    compile: bool = False
    """Compile the denoiser with torch.compile: the first steps take minutes, those after them less."""
    gradient_checkpointing: Annotated[bool, Flag(off="--no-gradient-checkpointing")] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time, the
    same numbers."""
    reference: ReferenceSource = "auto"
    """Errors of the reference: stored in the shards; recomputed once, before the first step, in this run's precision;
    live, by a second, frozen denoiser in memory (with --lora-rank by the same one, its adapter switched off); or auto:
    stored, and recomputed if the arithmetic noise of the stored ones is loud."""
    text: TextSource = "live"
    """Encode prompts live, as they come, or once, into a file in --cache that later runs find: the text encoders are
    then freed. Same numbers."""

    @property
    def chosen_dtype(self) -> Dtype:
        """The dtype, once the run has chosen one.

        Raises:
            RuntimeError: it has not.
        """
        if self.dtype is None:
            raise RuntimeError("no dtype is chosen yet")
        return self.dtype


class DataOptions(Options):
    """Which states are trained on, and how they are read."""

    model_config = ConfigDict(title="Data")

    min_timestep: Annotated[int | None, Field(ge=0)] = None
    """Leave out states at smaller timesteps."""
    max_timestep: Annotated[int | None, Field(ge=0)] = None
    """Leave out states at larger timesteps."""
    shuffle_window: Annotated[int, Field(ge=1)] = 65536
    """States that are shuffled together, at least: the shards of two such windows are in use."""
    cache: Annotated[Path, Flag(metavar="DIR")] = Path("~/.cache/smpo-diffusion")
    """Folder for shards that are fetched from URLs, and for encoded prompts; runs share it."""
    cache_gib: Annotated[float, Field(ge=0, le=MAX_CACHE_GIB)] = 100.0
    """Space for fetched shards there, in GiB; those in use are kept in any case."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read ahead; 0: the training process reads."""

    @property
    def cache_folder(self) -> Path:
        """``cache``, with ``~`` resolved."""
        return self.cache.expanduser()


class HeldOutOptions(Options):
    """Pairs that are not trained on."""

    model_config = ConfigDict(title="Held-out pairs")

    val_fraction: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Hold out the pairs of about this share of the prompts, the same ones in every run; loss and accuracy on them are
    logged as val/..."""
    val_every: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between two evaluations of them."""
    val_states: Annotated[int, Field(ge=1)] = 512
    """How many of their states are evaluated, of as many pairs as possible, evenly over all directories."""


class ImageOptions(Options):
    """Images drawn during the run."""

    model_config = ConfigDict(title="Validation images")

    validation_prompts: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Prompts, one a line: images of them, from fixed noise, are drawn into OUT/validation and TensorBoard. The VAE is
    loaded for each drawing, and for nothing else."""
    validation_every: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between two drawings; there is one before the first step and one after the last."""
    validation_sampling_steps: Annotated[int, Field(ge=1)] = 20
    """DDIM steps of an image."""
    validation_guidance_scale: Annotated[float, Field(ge=1)] = 7.5
    """Scale of classifier-free guidance; 1: none."""


class OutputOptions(Options):
    """What a run leaves besides its result."""

    model_config = ConfigDict(title="Checkpoints and logging")

    save_every: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between checkpoints, each of which is a model as OUT itself is one."""
    checkpoints_total_limit: Annotated[int, Field(ge=1)] = 2
    """How many checkpoints are kept, the last ones."""
    keep_checkpoints: bool = False
    """Keep them after the end, too. Without it a finished run keeps its last one."""
    wandb_project: Annotated[str | None, Flag(metavar="NAME")] = None
    """Log to this Weights & Biases project too; needs wandb installed."""


def _take_preset(context: typer.Context, name: str | None) -> str | None:
    """Make a preset's values the defaults of the flags; those of a config file and the command line still win."""
    if name is not None:
        context.default_map = {**find_preset(name).flags, **(context.default_map or {})}
    return name


class TrainSettings(Options):
    """One experiment, as it was asked for."""

    shards: Annotated[tuple[str, ...], Flag(metavar="DIR", place=True)]
    """Directories written by `smpo-pipeline invert`, folders or URLs (s3://, gs://, hf://: what fsspec knows); several
    are joined to one data set."""
    model: Annotated[str, Flag(metavar="ID|DIR", place=True)]
    """Base model that the shards were made with: hub id or diffusers folder."""
    out: Annotated[Path, Flag(metavar="DIR")]
    """Output folder: the trained model, metrics, checkpoints."""
    preset: Annotated[
        str | None,
        Flag(metavar="NAME", eager=_take_preset),
        Field(
            description=f"Published settings as defaults of the other flags: {', '.join(PRESETS)}. See --show-preset."
        ),
    ] = None
    overwrite: Overwrite = False
    """Start over. Without it an unfinished run continues from its checkpoint."""
    rewards: RewardOptions = RewardOptions()
    loss: LossOptions = LossOptions()
    steps: StepOptions = StepOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    denoiser: DenoiserOptions = DenoiserOptions()
    compute: ComputeOptions = ComputeOptions()
    data: DataOptions = DataOptions()
    held_out: HeldOutOptions = HeldOutOptions()
    images: ImageOptions = ImageOptions()
    output: OutputOptions = OutputOptions()

    def peak_lr(self, states_per_step: int) -> float:
        """The learning rate after warm-up.

        Args:
            states_per_step: pairs of an optimizer step, over all devices.

        Raises:
            UserError: a learning rate that is to be scaled is not given.
        """
        lr, scale_lr = self.optimizer.lr, self.optimizer.scale_lr
        if lr is not None:
            return lr * states_per_step if scale_lr else lr
        if scale_lr:
            raise UserError("--scale-lr multiplies --lr by the pairs of a step; name it, the published one is 1e-8")
        return DEFAULT_LR if self.denoiser.lora_rank is None else DEFAULT_LORA_LR
