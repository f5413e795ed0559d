"""The settings of a training run; each is a flag of ``smpo-train``.

This module does not import torch, so that ``--help`` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ConfigDict, Field

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, Overwrite
from smpo_schemas.choices import Dtype, OptimizerName, Quantization
from smpo_schemas.trained_model import LoraFormat
from smpo_trainer.loss_settings import IDENTITY, RESOLVED_IDENTITY, LossOptions, RewardOptions
from smpo_trainer.presets import PRESETS, find_preset

Device = Literal["cpu", "cuda"]
ReferenceSource = Literal["auto", "stored", "recomputed", "live"]
LrSchedule = Literal["constant", "linear", "cosine"]
OnSpike = Literal["continue", "stop", "rollback"]

DEFAULT_LR = 1e-5
DEFAULT_LORA_LR = 1e-4

MAX_SEED = 2**32 - 1
"""The largest seed that numpy accepts."""

MAX_CACHE_GIB = 2.0**30
"""An exbibyte."""


class StepOptions(Options):
    """Number and size of optimizer steps."""

    model_config = ConfigDict(title="Steps")

    max_steps: Annotated[int, Field(ge=1), IDENTITY] = 200
    """Optimizer steps. Run again with a larger number to continue a finished run."""
    batch_size: Annotated[int, Field(ge=1), RESOLVED_IDENTITY] = 8
    """States per device and forward pass. A state is one pair at one timestep: two images."""
    grad_accum: Annotated[int, Field(ge=1), RESOLVED_IDENTITY] = 1
    """Forward passes per optimizer step. SmPO's published runs have 1024 states per step, over all devices."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), IDENTITY] = 0
    """Seed of the order of states and of a new adapter's weights."""
    max_skipped: Annotated[int, Field(ge=1)] = 5
    """Skip and count steps whose loss or gradient is not finite; stop after this many in a row."""


class OptimizerOptions(Options):
    """Optimizer, learning rate, and average of the weights."""

    model_config = ConfigDict(title="Optimizer")

    optimizer: Annotated[OptimizerName, IDENTITY] = "adamw"
    """adamw (fused); adafactor, with at most half the memory; adamw8bit, on a GPU with bitsandbytes."""
    lr: Annotated[float | None, Field(ge=0), RESOLVED_IDENTITY] = None
    """Peak learning rate. Default: 1e-5, with --lora-rank 1e-4."""
    scale_lr: Annotated[bool, Flag(off="--no-scale-lr", identity="resolved")] = False
    """Multiply --lr by the states of an optimizer step: devices x --batch-size x --grad-accum."""
    warmup_steps: Annotated[int, Field(ge=0), IDENTITY] = 20
    """Optimizer steps over which the learning rate rises from 0; 100 in SmPO's published runs."""
    lr_schedule: Annotated[LrSchedule, IDENTITY] = "constant"
    """Learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0), IDENTITY] = 0.01
    """Decoupled weight decay, as in AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0), IDENTITY] = 1.0
    """Clip the gradient to this norm; 0 disables clipping."""
    ema_decay: Annotated[float | None, Field(ge=0, le=1), IDENTITY] = None
    """Keep an exponential moving average of the weights with this decay, such as 0.999. It is saved as the result, and
    used for held-out pairs and validation images. Default: none."""


class DenoiserOptions(Options):
    """Which weights are trained, and their start."""

    model_config = ConfigDict(title="Denoiser")

    lora_rank: Annotated[int | None, Field(ge=1), IDENTITY] = None
    """Train a LoRA of this rank on the attention projections. Default: train all weights."""
    lora_alpha: Annotated[float | None, Field(gt=0), RESOLVED_IDENTITY] = None
    """Scale the LoRA by this value divided by --lora-rank. Default: the rank, which is a scale of 1."""
    lora_format: LoraFormat = "diffusers"
    """Write the LoRA also in this format, to OUT and checkpoints: kohya_lora.safetensors for programs that read kohya's
    files, comfyui_lora.safetensors for ComfyUI. diffusers' own file is always written; every command here reads it."""
    quantize: Annotated[Quantization | None, IDENTITY] = None
    """Keep the frozen weights below the LoRA in 4 bits (nf4) or 8 (int8), with bitsandbytes. The reference is then this
    quantized model (see --reference); the LoRA is saved alone, and `evaluate` adds it to the unquantized model."""
    unet: Annotated[Path | None, Flag(metavar="DIR", identity="resolved")] = None
    """Start from this denoiser folder. Required if the shards were made with a denoiser other than the model's own."""
    variant: Annotated[str | None, Flag(metavar="NAME")] = None
    """Variant of the model's weight files, such as fp16. Default: files without a variant, or the only variant."""

    @property
    def other_lora_alpha(self) -> float | None:
        """``lora_alpha`` where it is not the rank."""
        return None if self.lora_alpha == self.lora_rank else self.lora_alpha


class ComputeOptions(Options):
    """Device, precision and memory."""

    model_config = ConfigDict(title="Device, precision and memory")

    device: Device | None = None
    """Device to train on. Default: a GPU if torch sees one, otherwise the CPU."""
    dtype: Annotated[Dtype | None, IDENTITY] = None
    """Dtype of forward and backward; trained weights and optimizer stay in fp32. Default: that of the run to resume; or
    that of `accelerate launch` or its config file; or bf16 on a GPU that supports it and fp32 elsewhere."""
    tf32: Annotated[bool, RESOLVED_IDENTITY] = False
    """Use TF32 for float32 matrix products and convolutions on NVIDIA GPUs: faster, but with
    about three decimal digits of precision."""
    compile: Annotated[bool, RESOLVED_IDENTITY] = False
    """Compile the denoiser with torch.compile: the first steps take minutes, later ones are faster."""
    gradient_checkpointing: Annotated[bool, Flag(off="--no-gradient-checkpointing")] = False
    """Recompute activations in the backward pass: less memory, about a third more time, the same results."""
    reference: Annotated[ReferenceSource, IDENTITY] = "auto"
    """Source of the reference's errors. stored: those in the shards. recomputed: computed once in this run's precision,
    before the first step. live: computed in every step by a second, frozen denoiser (with --lora-rank by the same one,
    with its adapter disabled). auto: stored, or recomputed if the rounding noise of the stored ones would move margins
    noticeably, and with --quantize."""

    @property
    def chosen_dtype(self) -> Dtype:
        """The dtype, after :func:`~smpo_trainer.runtime.launch.choose_dtype`.

        Raises:
            RuntimeError: the dtype is not chosen yet.
        """
        if self.dtype is None:
            raise RuntimeError("no dtype is chosen yet")
        return self.dtype


class DataOptions(Options):
    """Which states are trained on, and how they are read."""

    model_config = ConfigDict(title="Data")

    min_timestep: Annotated[int | None, Field(ge=0), IDENTITY] = None
    """Leave out states at smaller timesteps."""
    max_timestep: Annotated[int | None, Field(ge=0), IDENTITY] = None
    """Leave out states at larger timesteps."""
    shuffle_window: Annotated[int, Field(ge=1), IDENTITY] = 65536
    """Minimum number of states that are shuffled together. A larger window mixes better; the cache must hold the shards
    of two windows."""
    cache: Annotated[Path, Flag(metavar="DIR")] = Path("~/.cache/smpo-diffusion")
    """Folder for shards fetched from URLs; runs may share it."""
    cache_gib: Annotated[float, Field(ge=0, le=MAX_CACHE_GIB)] = 100.0
    """Space in --cache for fetched shards, in GiB. Beyond it, the shards that were unused for longest are deleted, but
    none in use."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Data loader processes; 0 reads in the training process."""

    @property
    def cache_folder(self) -> Path:
        """``cache``, with ``~`` expanded."""
        return self.cache.expanduser()


class HeldOutOptions(Options):
    """Pairs that are not trained on."""

    model_config = ConfigDict(title="Held-out pairs")

    val_fraction: Annotated[float, Field(ge=0, le=0.9), IDENTITY] = 0.0
    """Hold out about this fraction of the prompts with all their pairs, the same ones in every run. Their loss and
    accuracy are logged as val/..."""
    val_every: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between two evaluations on them."""
    val_states: Annotated[int, Field(ge=1)] = 512
    """Maximum number of held-out states to evaluate, spread over as many pairs as possible."""


class ImageOptions(Options):
    """Images drawn during the run."""

    model_config = ConfigDict(title="Validation images")

    image_prompts: Annotated[Path | None, Flag(metavar="FILE")] = None
    """File with one prompt per line. Their images, from fixed noise, are written to OUT/validation and to TensorBoard.
    The VAE is loaded only to draw them."""
    image_every: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between two drawings. Images are also drawn before the first step and after the last."""
    image_sampling_steps: Annotated[int | None, Field(ge=1)] = None
    """Steps per image, of the model's own sampler. Default: 20; 4 for FLUX.1-schnell."""
    image_guidance_scale: Annotated[float | None, Field(ge=1)] = None
    """Scale of classifier-free guidance, 1 is none; for FLUX.1-dev, the guidance scale that is an input of the model.
    Default: that of `smpo-pipeline evaluate`."""


class SafeguardOptions(Options):
    """What is done when a run goes wrong."""

    model_config = ConfigDict(title="When a run goes wrong")

    on_spike: OnSpike = "continue"
    """When the model's error rises suddenly, as in a run that diverges: continue with a warning; stop; or rollback, to
    a checkpoint of 20 steps before it or more, which is kept (soon after another rollback to the earliest left), with
    half of the learning rate. Spikes are listed in OUT/spikes.jsonl."""
    spike_ratio: Annotated[float, Field(gt=1)] = 2.0
    """A spike is where, for 3 steps, the ratio of the model's error to the reference's is above this many times its
    median over the 20 steps before."""
    validation_reward: Annotated[str | None, Flag(metavar="NAME[=MODEL]", identity="value")] = None
    """Score the images of --image-prompts by this reward, as `smpo-pipeline score --reward` names it, each time they
    are drawn. The model with the highest mean is the result, and is kept in OUT/best. Choose a reward that is not
    trained on. It is loaded in a separate process."""
    validation_patience: Annotated[int, Field(ge=1), RESOLVED_IDENTITY] = 3
    """With --validation-reward: end the run after this many drawings in a row without a new best mean."""


class OutputOptions(Options):
    """Checkpoints and logs."""

    model_config = ConfigDict(title="Checkpoints and logging")

    save_every: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between two checkpoints. Each checkpoint is also a model that diffusers loads, like OUT."""
    checkpoints_total_limit: Annotated[int, Field(ge=1)] = 2
    """Number of checkpoints to keep, the latest ones."""
    keep_checkpoints: bool = False
    """Keep these checkpoints after the run. By default a finished run keeps only its last one."""
    wandb_project: Annotated[str | None, Flag(metavar="NAME")] = None
    """Also log to this Weights & Biases project; needs wandb."""


class SharingOptions(Options):
    """The result on the Hugging Face hub."""

    model_config = ConfigDict(title="Hugging Face hub")

    push_to_hub: Annotated[str | None, Flag(metavar="OWNER/NAME", recorded=False)] = None
    """Upload the trained model, with a model card, to this repository at the end, or at once if the run is finished.
    Needs a token (`hf auth login`, or HF_TOKEN). Before training, the repository is made and write access checked."""
    hub_private_repo: bool = False
    """Make a new repository private. Default: public, unless its organisation chose otherwise."""
    license_: Annotated[str | None, Flag(metavar="ID")] = None
    """License in the model card, by the hub's identifier, such as openrail++. Default: none is named."""


def _apply_preset(context: typer.Context, name: str | None) -> str | None:
    """Make a preset's values the defaults of the flags; a config file and the command line override them."""
    if name is not None:
        context.default_map = {**find_preset(name).flags, **(context.default_map or {})}
    return name


class TrainSettings(Options):
    """The settings of a run, as given by the user."""

    shards: Annotated[tuple[str, ...], Flag(metavar="DIR", place=True, identity="resolved")]
    """Outputs of `smpo-pipeline invert`: folders or URLs (s3://, gs://, hf:// and others that fsspec supports). Several
    are joined into one data set."""
    model: Annotated[str, Flag(metavar="ID|DIR", place=True)]
    """Base model that the shards were made with: hub id or diffusers folder."""
    out: Annotated[Path, Flag(metavar="DIR")]
    """Output folder for the trained model, metrics and checkpoints."""
    preset: Annotated[
        str | None,
        Flag(metavar="NAME", eager=_apply_preset),
        Field(
            description=f"Published settings as defaults of the other flags; see --show-preset. {', '.join(PRESETS)}."
        ),
    ] = None
    overwrite: Overwrite = False
    """Delete the run in OUT and start over. By default an unfinished run resumes from its last checkpoint."""
    print_config: Annotated[bool, Flag(recorded=False)] = False
    """Print all flags with their values, those of a preset included, as a config file, and exit."""
    rewards: RewardOptions = RewardOptions()
    loss: LossOptions = LossOptions()
    steps: StepOptions = StepOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    denoiser: DenoiserOptions = DenoiserOptions()
    compute: ComputeOptions = ComputeOptions()
    data: DataOptions = DataOptions()
    held_out: HeldOutOptions = HeldOutOptions()
    images: ImageOptions = ImageOptions()
    safeguards: SafeguardOptions = SafeguardOptions()
    output: OutputOptions = OutputOptions()
    sharing: SharingOptions = SharingOptions()

    @property
    def recomputes_reference(self) -> bool:
        """Whether reference errors are recomputed whatever their noise.

        With ``--quantize`` they are by default: those in shards are of the unquantized model.
        """
        return self.compute.reference == "recomputed" or (
            self.compute.reference == "auto" and self.denoiser.quantize is not None
        )

    def peak_lr(self, states_per_step: int) -> float:
        """Return the learning rate after the warm-up.

        Args:
            states_per_step: states of an optimizer step, over all devices.

        Raises:
            UserError: ``--scale-lr`` is given without ``--lr``.
        """
        lr, scale_lr = self.optimizer.lr, self.optimizer.scale_lr
        if lr is not None:
            return lr * states_per_step if scale_lr else lr
        if scale_lr:
            raise UserError(
                "--scale-lr multiplies --lr by the states of a step: give --lr too; the published value is 1e-8"
            )
        return DEFAULT_LR if self.denoiser.lora_rank is None else DEFAULT_LORA_LR
