"""``smpo-train``: the command line. Parses, and hands over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smpo_common.commandline import ConfigOption, run_app, write_resolved_config
from smpo_trainer import flags
from smpo_trainer.presets import PICKSCORE_RANGE
from smpo_trainer.settings import (
    MAX_CACHE_GIB,
    MAX_SEED,
    LrSchedule,
    ReferenceSource,
    TrainSettings,
    parse_options,
    parse_ranges,
    parse_rewards,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_Shards = Annotated[
    list[str],
    typer.Option(
        metavar="DIR",
        help="Directories written by `smpo-pipeline invert`, folders or URLs (s3://, gs://, hf://: what fsspec knows); "
        "several are joined to one data set.",
    ),
]
_Model = Annotated[str, typer.Option(help="Base model that the shards were made with: hub id or diffusers folder.")]
_Out = Annotated[Path, typer.Option(help="Output folder: the trained model, metrics, checkpoints.")]
_Reward = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:WEIGHT]",
        help="Reward to prefer by, weight 1 where none is given; several are mixed. "
        "May be left out where there is only one.",
    ),
]
_Preference = Annotated[
    str,
    typer.Option(
        help="From rewards to P(image_0 preferred). minmax: sigmoid of the weighted sum of their differences, each "
        "scaled by max - min over the data set. mixture: weighted mean of their sigmoids, scaled by a --calibration. "
        "winrate: difference of how often each image beats the other images of its prompt (CaPO); needs --scores."
    ),
]
_Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Output of `smpo-pipeline calibrate`, for mixture and winrate: each reward's temperature, and its weight "
        "where no --reward is given.",
    ),
]
_RewardRange = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=MIN:MAX|raw",
        help="Scale of a reward for minmax and winrate, in units of its raw score, in place of the data set's minimum "
        f"and maximum; raw for one that is log-odds. Published by SmPO for PickScore: {PICKSCORE_RANGE}.",
    ),
]
_Scores = Annotated[
    Path | None,
    typer.Option(
        help="Output of `smpo-pipeline score` to use in place of the shards' scores, joined by pair_id and prompt."
    ),
]
_Beta = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Scale of the implicit reward (times half the mean squared error). Larger stays closer to the reference. "
        "Default: as published, 2000 for SD 1.x and 2.x, 5000 for SDXL; npo 1000 and 2000; dmpo 2000 and 6000.",
    ),
]
_Gamma = Annotated[float, typer.Option(min=0, help="Scale of the smoothed preference: p counts as gamma (2p - 1).")]
_MaxSteps = Annotated[
    int, typer.Option(min=1, help="Optimizer steps. With a larger number the same command continues a finished run.")
]
_BatchSize = Annotated[
    int, typer.Option(min=1, help="Pairs (states) that one device takes at once; a forward has twice as many rows.")
]
_GradAccum = Annotated[
    int,
    typer.Option(
        min=1,
        help="Such batches that make one optimizer step. The published runs take 1024 pairs a step over all devices.",
    ),
]
_Lr = Annotated[float | None, typer.Option(min=0, help="Peak learning rate. Default: 1e-5, with --lora-rank 1e-4.")]
_Warmup = Annotated[int, typer.Option(min=0, help="Optimizer steps over which the learning rate rises from 0.")]
_Schedule = Annotated[LrSchedule, typer.Option(help="Course of the learning rate after the warm-up.")]
_WeightDecay = Annotated[float, typer.Option(min=0, help="Weight decay, per unit of learning rate.")]
_MaxGradNorm = Annotated[float, typer.Option(min=0, help="Scale the gradient down to this norm; 0: never.")]
_LoraRank = Annotated[
    int | None,
    typer.Option(min=1, help="Train an adapter of this rank on the attention projections; default: all weights."),
]
_Unet = Annotated[
    Path | None,
    typer.Option(help="Start from this denoiser folder; needed where the model's own is not the shards' reference."),
]
_Variant = Annotated[
    str | None,
    typer.Option(
        help="Variant of the model's files of weights, for example fp16. Default: those without one, or the only one "
        "that is there."
    ),
]
_Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the order of the states and of a new adapter.")]
_Reference = Annotated[
    ReferenceSource,
    typer.Option(
        help="Errors of the reference: stored in the shards; recomputed once, before the first step, in this run's "
        "precision; live, by a second, frozen denoiser in memory (with --lora-rank by the same one, its adapter "
        "switched off); or auto: stored, and recomputed where the arithmetic noise of the stored ones is loud."
    ),
]
_MinTimestep = Annotated[int | None, typer.Option(min=0, help="Leave out states at smaller timesteps.")]
_MaxTimestep = Annotated[int | None, typer.Option(min=0, help="Leave out states at larger timesteps.")]
_SaveEvery = Annotated[
    int,
    typer.Option(min=1, help="Optimizer steps between checkpoints, each of which is a model as OUT itself is one."),
]
_TotalLimit = Annotated[int, typer.Option(min=1, help="How many checkpoints are kept, the last ones.")]
_KeepCheckpoints = Annotated[
    bool,
    typer.Option(
        "--keep-checkpoints", help="Keep them after the end, too. Without it a finished run keeps its last one."
    ),
]
_ShuffleWindow = Annotated[
    int,
    typer.Option(min=1, help="States that are shuffled together, at least: the shards of two such windows are in use."),
]
_Cache = Annotated[
    Path, typer.Option(help="Folder for shards that are fetched from URLs, and for encoded prompts; runs share it.")
]
_CacheGib = Annotated[
    float,
    typer.Option(
        min=0,
        max=MAX_CACHE_GIB,
        help="What fetched shards may take there, in GiB; those in use are kept whatever it is.",
    ),
]
_Workers = Annotated[int, typer.Option(min=0, help="Processes that read ahead; 0: the training process reads.")]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Begin anew. Without it an unfinished run goes on from its checkpoint.")
]


@app.command()
def train(
    context: typer.Context,
    shards: _Shards,
    model: _Model,
    out: _Out,
    objective: flags.Objective = "smpo",
    reward: _Reward = None,
    preference: _Preference = "minmax",
    calibration: _Calibration = None,
    reward_range: _RewardRange = None,
    scores: _Scores = None,
    beta: _Beta = None,
    gamma: _Gamma = 10.0,
    objective_option: flags.ObjectiveOption = None,
    timestep_weighting: flags.TimestepWeighting = None,
    snr_gamma: flags.SnrGamma = 5.0,
    sigmoid_bias: flags.SigmoidBias = None,
    budget: flags.Budget = None,
    budget_weight: flags.BudgetWeight = 1.0,
    weight_column: flags.WeightColumn = None,
    max_steps: _MaxSteps = 200,
    batch_size: _BatchSize = 8,
    grad_accum: _GradAccum = 1,
    optimizer: flags.Optimizer = "adamw",
    lr: _Lr = None,
    scale_lr: flags.ScaleLr = False,
    warmup_steps: _Warmup = 20,
    lr_schedule: _Schedule = "constant",
    weight_decay: _WeightDecay = 0.01,
    max_grad_norm: _MaxGradNorm = 1.0,
    ema_decay: flags.EmaDecay = None,
    gradient_checkpointing: flags.GradientCheckpointing = False,
    compile: flags.Compile = False,  # noqa: A002  (the flag's name)
    tf32: flags.Tf32 = False,
    max_skipped: flags.MaxSkipped = 5,
    lora_rank: _LoraRank = None,
    unet: _Unet = None,
    variant: _Variant = None,
    seed: _Seed = 0,
    device: flags.Device = None,
    mixed_precision: flags.MixedPrecision = None,
    reference: _Reference = "auto",
    text: flags.Text = "live",
    min_timestep: _MinTimestep = None,
    max_timestep: _MaxTimestep = None,
    val_fraction: flags.ValFraction = 0.0,
    val_every: flags.ValEvery = 50,
    val_states: flags.ValStates = 512,
    validation_prompts: flags.ValidationPrompts = None,
    validation_every: flags.ValidationEvery = 100,
    validation_sampling_steps: flags.ValidationSamplingSteps = 20,
    validation_guidance_scale: flags.ValidationGuidanceScale = 7.5,
    save_every: _SaveEvery = 50,
    checkpoints_total_limit: _TotalLimit = 2,
    keep_checkpoints: _KeepCheckpoints = False,
    shuffle_window: _ShuffleWindow = 65536,
    cache: _Cache = Path("~/.cache/smpo-diffusion"),
    cache_gib: _CacheGib = 100.0,
    workers: _Workers = 2,
    overwrite: _Overwrite = False,
    preset: flags.Preset = None,
    wandb_project: flags.WandbProject = None,
    list_objectives: flags.ListObjectives = False,  # noqa: ARG001  (its callback has printed them)
    config: ConfigOption = None,  # noqa: ARG001  (its callback has read it)
) -> None:
    """Align a diffusion model with preference, from shards.

    Run it under `torchrun` or `accelerate launch` for several devices: `torchrun -m smpo_trainer ...`.
    The same command continues a run that was stopped or killed.
    """
    settings = TrainSettings(
        shards=tuple(shards),
        model=model,
        out=out,
        objective=objective,
        rewards=parse_rewards(reward or []),
        preference=preference,
        calibration=calibration,
        reward_ranges=parse_ranges(reward_range or []),
        scores=scores,
        beta=beta,
        gamma=gamma,
        objective_options=parse_options(objective_option or []),
        timestep_weighting=timestep_weighting,
        snr_gamma=snr_gamma,
        sigmoid_bias=sigmoid_bias,
        budget=budget,
        budget_weight=budget_weight,
        weight_column=weight_column,
        max_steps=max_steps,
        batch_size=batch_size,
        grad_accum=grad_accum,
        optimizer=optimizer,
        lr=lr,
        scale_lr=scale_lr,
        warmup_steps=warmup_steps,
        lr_schedule=lr_schedule,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        ema_decay=ema_decay,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        tf32=tf32,
        max_skipped=max_skipped,
        lora_rank=lora_rank,
        unet=unet,
        variant=variant,
        seed=seed,
        device=device,
        mixed_precision=mixed_precision or "no",  # its callback has resolved it
        reference=reference,
        text=text,
        min_timestep=min_timestep,
        max_timestep=max_timestep,
        val_fraction=val_fraction,
        val_every=val_every,
        val_states=val_states,
        validation_prompts=validation_prompts,
        validation_every=validation_every,
        validation_sampling_steps=validation_sampling_steps,
        validation_guidance_scale=validation_guidance_scale,
        save_every=save_every,
        checkpoints_total_limit=checkpoints_total_limit,
        keep_checkpoints=keep_checkpoints,
        shuffle_window=shuffle_window,
        cache=cache.expanduser(),
        cache_gib=cache_gib,
        workers=workers,
        overwrite=overwrite,
        preset=preset,
        wandb_project=wandb_project,
    )
    from smpo_trainer.run import run_training  # noqa: PLC0415  (seconds of torch and diffusers, which --help saves)

    run_training(settings, lambda directory: write_resolved_config(context, directory))


def main() -> None:
    """Entry point of the ``smpo-train`` script."""
    run_app(app)


if __name__ == "__main__":
    main()
