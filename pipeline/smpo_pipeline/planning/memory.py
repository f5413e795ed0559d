"""Calculate the GPU memory that `invert` and `smpo-train` need, and a checkpoint's disk space, from configs alone."""

from __future__ import annotations

from smpo_common.options import flag_name
from smpo_models.loading import load_family
from smpo_models.memory_account.inversion import InversionMemory, InversionRun, account_inversion
from smpo_models.memory_account.training import TrainingMemory, TrainingRun, account_training
from smpo_pipeline.jobs.invert.models import choose_text
from smpo_pipeline.planning.options import PlanOptions
from smpo_schemas.choices import Dtype
from smpo_schemas.frozen import FrozenModel
from smpo_schemas.inversion_settings import GENERATED

GB = 10**9


class MemoryPlan(FrozenModel):
    """The memory that a model needs, in bytes.

    Attributes:
        model, resolution, dtype: from the flags, or the model's own.
        gpu_memory: memory of the GPU; None where the flag is not given.
        trajectories: number in a batch of `invert`.
        states: number in a micro-batch of `smpo-train`.
        invert, train: the parts of each, by name; see :mod:`smpo_models.memory_account`.
        invert_total, train_total: the peaks.
        remedies: flags of `smpo-train` that would save memory.
    """

    model: str
    resolution: int
    dtype: Dtype
    gpu_memory: float | None
    trajectories: int
    states: int
    invert: dict[str, int]
    invert_total: int
    train: dict[str, int]
    train_total: int
    remedies: list[str]

    def fits(self, total: int) -> bool | None:
        """Whether the GPU has that much; None where its memory is not given."""
        return None if self.gpu_memory is None else total <= self.gpu_memory


def plan_memory(options: PlanOptions) -> MemoryPlan:
    """Calculate the memory of `invert` and `smpo-train` with the flags of `plan`.

    Raises:
        UserError: the model's configs cannot be read, or it does not know the resolution or takes no adapter.
    """
    models, flags = options.models, options.memory
    options = choose_text(options)
    family = load_family(models.model, ("text", "vae"), denoiser=models.unet, vae=models.vae, device="meta")
    side = models.resolution or family.resolution()
    family.check_resolution(side, models.model)
    if flags.lora_rank is not None:
        family.check_lora(flags.lora_rank, f"--model {models.model}")
    # The dtype of a GPU, even if this machine has none.
    dtype, holds_text = options.running.dtype or "bf16", options.storing.text == "live"
    train = account_training(
        family,
        TrainingRun(
            side,
            side,
            batch_size=flags.train_batch_size,
            dtype=dtype,
            lora_rank=flags.lora_rank,
            quantize=flags.quantize,
            gradient_checkpointing=flags.gradient_checkpointing,
            accumulates=flags.grad_accum > 1,
            optimizer=flags.optimizer,
            averages=flags.ema_decay is not None,
            holds_text=holds_text,
        ),
    )
    trajectories = options.running.batch_size or 1
    generated = options.trajectory.source in GENERATED
    inverting = InversionRun(
        side,
        side,
        batch_size=trajectories,
        dtype=dtype,
        holds_text=holds_text,
        own_inverting_denoiser=generated or models.inverting_unet is None,
        encodes_images=not generated,
    )
    invert = account_inversion(family, inverting)
    return MemoryPlan(
        model=models.model,
        resolution=side,
        dtype=dtype,
        gpu_memory=None if flags.gpu_memory is None else flags.gpu_memory * GB,
        trajectories=trajectories,
        states=flags.train_batch_size,
        invert=_parts(invert),
        invert_total=invert.total,
        train=_parts(train),
        train_total=train.total,
        remedies=_remedies(options, holds_text=holds_text),
    )


def _parts(memory: InversionMemory | TrainingMemory) -> dict[str, int]:
    return dict(vars(memory))


def _remedies(options: PlanOptions, *, holds_text: bool) -> list[str]:
    flags = options.memory
    helps = {
        "a smaller --train-batch-size": flags.train_batch_size > 1,
        flag_name("gradient_checkpointing"): not flags.gradient_checkpointing,
        "--text stored": holds_text,
        "--lora-rank 16": flags.lora_rank is None,
        "--quantize nf4": flags.lora_rank is not None and flags.quantize != "nf4",
    }
    return [flag for flag, does_help in helps.items() if does_help]
