"""What a user sets for one training run. Imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from smpo_common.errors import UserError

MixedPrecision = Literal["no", "fp16", "bf16"]
"""Dtype of the denoiser's forward and backward; weights and optimizer stay float32."""

Device = Literal["cpu", "cuda"]
"""What to train on."""

ReferenceSource = Literal["auto", "stored", "recomputed", "live"]
"""Where the reference's errors come from: the shards; one pass of this run's own arithmetic before it starts; a second,
frozen denoiser in memory (with LoRA the same one, its adapter switched off); or (auto) the shards, unless their
arithmetic noise is loud: then such a pass."""

TextSource = Literal["live", "cache"]
"""Whether prompts are encoded as they come, or all of them once, into a file."""

TimestepWeightingKind = Literal["uniform", "min-snr", "sigmoid"]
"""How much a state counts by its timestep."""

LrSchedule = Literal["constant", "linear", "cosine"]
"""Course of the learning rate after its linear warm-up."""

Optimizer = Literal["adamw", "adafactor", "adamw8bit"]
"""What makes a step of a gradient."""

DEFAULT_LR = 1e-5
DEFAULT_LORA_LR = 1e-4

MAX_SEED = 2**32 - 1
"""The largest that numpy takes."""

MAX_CACHE_GIB = 2.0**30
"""An exbibyte."""


@dataclass(frozen=True)
class TrainSettings:
    """One experiment, as it was asked for.

    Attributes:
        shards: directories written by ``smpo-pipeline invert``, folders or URLs; several are joined.
        model: hub id or folder of the base model.
        out: output folder.
        objective: name of the loss.
        rewards: weight of each reward in the mix; empty: the only one that there is.
        preference: name of the way from several rewards to P(image_0 preferred).
        calibration: ``calibration.json`` with each reward's temperature and share; None: none.
        reward_ranges: by reward name, the minimum and maximum that replace those of the data set.
        scores: output of ``smpo-pipeline score`` whose scores replace the shards', joined by pair_id and prompt.
        beta: scale of the implicit reward; None: the objective's published one for the model's kind.
        gamma: scale of the smoothed preference.
        objective_options: of the objective's own options, as they were typed.
        timestep_weighting: how much a state counts by its timestep; None: the objective's published weighting.
        snr_gamma: of the weighting ``min-snr``.
        sigmoid_bias: of the weighting ``sigmoid``; None: the objective's published one.
        budget: how far the preferred image's error may rise above the reference's, in margin units; None: unlimited.
        budget_weight: what the excess over the budget is multiplied with.
        weight_column: column of the scores table with a weight for each pair; None: all count alike.
        max_steps: optimizer steps.
        batch_size: pairs (states) a process takes at once.
        grad_accum: micro-batches of an optimizer step.
        optimizer: what makes a step of a gradient.
        lr: peak learning rate; None: :data:`DEFAULT_LR`, with LoRA :data:`DEFAULT_LORA_LR`.
        scale_lr: multiply ``lr`` by the pairs of an optimizer step.
        warmup_steps: optimizer steps of linear warm-up.
        lr_schedule: course after the warm-up.
        weight_decay: the optimizer's.
        max_grad_norm: the gradient is scaled down to this norm; 0: never.
        ema_decay: of the moving average of the weights, which is then what is saved; None: none is kept.
        gradient_checkpointing: compute activations again in the backward pass rather than keep them.
        compile: compile the denoiser with torch.compile.
        tf32: float32 products of matrices and convolutions in TF32.
        max_skipped: steps in a row with a loss or gradient that is not finite which end the run.
        lora_rank: rank of the adapter; None trains all weights.
        unet: folder of the denoiser to start from; None: the model's own.
        variant: of the model's files of weights; None: those without one, or the only one there.
        seed: of the order of the states and the adapter's first weights.
        device: what to train on; None: an accelerator where torch sees one.
        mixed_precision: dtype of forward and backward.
        reference: where the reference's errors come from.
        text: whether prompts are encoded as they come, or once, into a file in ``cache``.
        min_timestep: states at smaller timesteps are left out; None: no limit.
        max_timestep: states at larger timesteps are left out; None: no limit.
        val_fraction: of the prompts, about, whose pairs are held out; 0: none.
        val_every: optimizer steps from one look at the held-out pairs to the next.
        val_states: how many of their states are looked at.
        validation_prompts: file of prompts to draw images of; None: none are drawn.
        validation_every: optimizer steps from one drawing to the next.
        validation_sampling_steps: of the sampler.
        validation_guidance_scale: of classifier-free guidance; 1: none.
        save_every: optimizer steps from checkpoint to checkpoint.
        checkpoints_total_limit: how many checkpoints are kept.
        keep_checkpoints: also of a finished run, which otherwise keeps its last one.
        shuffle_window: states that are shuffled together, at least.
        cache: folder for shards that are fetched from URLs, and for encoded prompts.
        cache_gib: what fetched shards may take there.
        workers: loader processes; 0 reads in the training process.
        overwrite: begin anew where the output folder holds a run.
        preset: name of the published settings that the flags' defaults come from, or None.
        wandb_project: project to log to besides the output folder, or None.
    """

    shards: tuple[str, ...]
    model: str
    out: Path
    objective: str
    rewards: dict[str, float]
    preference: str
    calibration: Path | None
    reward_ranges: dict[str, tuple[float, float]]
    scores: Path | None
    beta: float | None
    gamma: float
    objective_options: dict[str, str]
    timestep_weighting: TimestepWeightingKind | None
    snr_gamma: float
    sigmoid_bias: float | None
    budget: float | None
    budget_weight: float
    weight_column: str | None
    max_steps: int
    batch_size: int
    grad_accum: int
    optimizer: Optimizer
    lr: float | None
    scale_lr: bool
    warmup_steps: int
    lr_schedule: LrSchedule
    weight_decay: float
    max_grad_norm: float
    ema_decay: float | None
    gradient_checkpointing: bool
    compile: bool
    tf32: bool
    max_skipped: int
    lora_rank: int | None
    unet: Path | None
    variant: str | None
    seed: int
    device: Device | None
    mixed_precision: MixedPrecision
    reference: ReferenceSource
    text: TextSource
    min_timestep: int | None
    max_timestep: int | None
    val_fraction: float
    val_every: int
    val_states: int
    validation_prompts: Path | None
    validation_every: int
    validation_sampling_steps: int
    validation_guidance_scale: float
    save_every: int
    checkpoints_total_limit: int
    keep_checkpoints: bool
    shuffle_window: int
    cache: Path
    cache_gib: float
    workers: int
    overwrite: bool
    preset: str | None
    wandb_project: str | None

    def __post_init__(self) -> None:
        """Refuse infinity and NaN, which no flag's lower bound does.

        Raises:
            UserError: a setting is one of them.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{field.name.replace('_', '-')} {value}: expected a finite number")

    def peak_lr(self, states_per_step: int) -> float:
        """The learning rate after warm-up.

        Args:
            states_per_step: pairs of an optimizer step, over all devices.

        Raises:
            UserError: a learning rate that is to be scaled is not given.
        """
        if self.lr is not None:
            return self.lr * states_per_step if self.scale_lr else self.lr
        if self.scale_lr:
            raise UserError("--scale-lr multiplies --lr by the pairs of a step; name it, the published one is 1e-8")
        return DEFAULT_LR if self.lora_rank is None else DEFAULT_LORA_LR


def parse_rewards(texts: Sequence[str]) -> dict[str, float]:
    """Weights by name from ``NAME`` (weight 1) or ``NAME:WEIGHT``.

    Raises:
        UserError: a weight is no finite number, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, colon, number = text.partition(":")
        if "," in text:
            raise UserError(f"--reward {text}: several rewards are written --reward {' '.join(text.split(','))}")
        if "=" in name:
            raise UserError(f"--reward {text}: a weight is written {text.replace('=', ':')}")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise UserError(f"--reward {text}: expected NAME or NAME:WEIGHT with a number as weight")
        if name in weights:
            raise UserError(f"--reward {name} is given twice; its weight is one number")
        weights[name] = weight
    return weights


def parse_options(texts: Sequence[str]) -> dict[str, str]:
    """Values by name from ``NAME=VALUE``.

    Raises:
        UserError: one is not of that form, or a name comes twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"--objective-option {text}: expected NAME=VALUE")
        if name in values:
            raise UserError(f"--objective-option {name} is given twice")
        values[name] = value
    return values


def parse_ranges(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Minimum and maximum by reward name from ``NAME=MIN:MAX``, in units of the raw score.

    Only their difference counts: ``NAME=raw``, for scores that are log-odds, is 0 and 1.

    Raises:
        UserError: they are no finite numbers in rising order, or a name comes twice.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        numbers = "0:1" if numbers == "raw" else numbers
        try:
            low, high = (float(number) for number in numbers.split(":"))
        except ValueError:
            low = high = math.nan
        if not name or not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(
                f"--reward-range {text}: expected NAME=MIN:MAX with two numbers, the smaller one first, or NAME=raw"
            )
        if name in ranges:
            raise UserError(f"--reward-range {name} is given twice")
        ranges[name] = (low, high)
    return ranges
