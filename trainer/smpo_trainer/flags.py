"""What ``smpo-train --help`` says of the flags that it shows in groups of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from smpo_common.errors import UserError
from smpo_trainer.presets import PRESETS
from smpo_trainer.settings import Device as DeviceName
from smpo_trainer.settings import MixedPrecision as MixedPrecisionName
from smpo_trainer.settings import Optimizer as OptimizerName
from smpo_trainer.settings import TextSource, TimestepWeightingKind

_OBJECTIVE = "Objective"
_OPTIMIZER = "Optimizer"
_HELD_OUT = "Held-out pairs"
_VALIDATION = "Validation images"


def _list_objectives(wanted: bool) -> None:
    if not wanted:
        return
    from smpo_trainer.objectives import objectives  # noqa: PLC0415  (seconds of torch, which --help saves)

    for name, objective in sorted(objectives().items()):
        typer.echo(f"{name:6} {objective.summary}")
        for option in objective.Options.own():
            typer.echo(f"       {option}: {objective.Options.model_fields[option].description}")
    raise typer.Exit


def _take_preset(context: typer.Context, name: str | None) -> str | None:
    """Make a preset's values the defaults of this command; a config file's and the command line's still win."""
    if name is None:
        return None
    if name not in PRESETS:
        raise UserError(f"--preset {name} is not known; known: {', '.join(PRESETS)}")
    context.default_map = {**PRESETS[name].flags, **(context.default_map or {})}
    return name


def _take_precision(given: MixedPrecisionName | None) -> MixedPrecisionName:
    """The flag's value; without it what `accelerate launch` or its config file say."""
    if given is not None:
        return given
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in get_args(MixedPrecisionName):
        raise UserError(
            f"accelerate's mixed_precision {launched} is not known here; give --mixed-precision no, fp16 or bf16"
        )
    return cast("MixedPrecisionName", launched)


Objective = Annotated[
    str,
    typer.Option(
        help="Loss: smpo (smoothed preferences of rewards), dpo (labels), ipo, capo, dmpo, mapo, npo or sft; "
        "see --list-objectives.",
        rich_help_panel=_OBJECTIVE,
    ),
]
ListObjectives = Annotated[
    bool,
    typer.Option(
        "--list-objectives",
        callback=_list_objectives,
        is_eager=True,
        expose_value=False,
        help="Print every objective with its own options, and leave.",
        rich_help_panel=_OBJECTIVE,
    ),
]
ObjectiveOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="An option of the objective's own, such as label_smoothing=0.1 of dpo; see --list-objectives.",
        rich_help_panel=_OBJECTIVE,
    ),
]
TimestepWeighting = Annotated[
    TimestepWeightingKind | None,
    typer.Option(
        help="How much a state counts by its timestep: its errors are multiplied by 1, or by weights that fall with "
        "the signal-to-noise ratio (min-snr, sigmoid). Default: as published; sigmoid for capo, uniform for the rest.",
        rich_help_panel=_OBJECTIVE,
    ),
]
SnrGamma = Annotated[
    float,
    typer.Option(
        min=0, help="Of --timestep-weighting min-snr: the SNR from which weights fall.", rich_help_panel=_OBJECTIVE
    ),
]
SigmoidBias = Annotated[
    float | None,
    typer.Option(
        help="Of --timestep-weighting sigmoid: the log SNR at which the weight is 1/2. Default: 1.5 for capo, 0 for "
        "the rest.",
        rich_help_panel=_OBJECTIVE,
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="How far the preferred image's error may rise above the reference's (times beta/2: in margin units) "
        "before the excess is added to the loss. Default: unlimited.",
        rich_help_panel=_OBJECTIVE,
    ),
]
BudgetWeight = Annotated[
    float, typer.Option(min=0, help="What the excess over --budget is multiplied with.", rich_help_panel=_OBJECTIVE)
]
WeightColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column with a weight for each pair, in the Parquet files of the table that --scores names. A pair "
        "without one is left out.",
        rich_help_panel=_OBJECTIVE,
    ),
]

Optimizer = Annotated[
    OptimizerName,
    typer.Option(
        help="adamw (fused); adafactor, which needs half its memory or less; adamw8bit, on a GPU with bitsandbytes.",
        rich_help_panel=_OPTIMIZER,
    ),
]
ScaleLr = Annotated[
    bool,
    typer.Option(
        help="Multiply --lr by the pairs of an optimizer step: devices x --batch-size x --grad-accum.",
        rich_help_panel=_OPTIMIZER,
    ),
]
EmaDecay = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Keep a moving average of the weights with this decay, such as 0.999, and save it as the result; held-out "
        "pairs and validation images are of it too. Default: none.",
        rich_help_panel=_OPTIMIZER,
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        help="Compute activations again in the backward pass rather than keep them: less memory, about a third more "
        "time, the same numbers.",
        rich_help_panel=_OPTIMIZER,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the denoiser with torch.compile: the first steps take minutes, those after them less.",
        rich_help_panel=_OPTIMIZER,
    ),
]
Tf32 = Annotated[
    bool,
    typer.Option(
        "--tf32",
        help="On NVIDIA GPUs, multiply float32 matrices, and convolve, in TF32: faster, to about three digits.",
        rich_help_panel=_OPTIMIZER,
    ),
]
MaxSkipped = Annotated[
    int,
    typer.Option(
        min=1,
        help="A step whose loss or gradient is not finite is skipped and counted; so many in a row end the run.",
        rich_help_panel=_OPTIMIZER,
    ),
]
MixedPrecision = Annotated[
    MixedPrecisionName | None,
    typer.Option(
        callback=_take_precision,
        help="Dtype of forward and backward; weights and optimizer stay float32. Default: that of `accelerate launch` "
        "or its config file, or else no.",
    ),
]
Device = Annotated[
    DeviceName | None, typer.Option(help="What to train on. Default: a GPU where torch sees one, or else the CPU.")
]
Text = Annotated[
    TextSource,
    typer.Option(
        help="Encode prompts live, as they come, or once, into a file in "
        "--cache that later runs find: the text encoders are then freed. Same numbers.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        callback=_take_preset,
        is_eager=True,
        help=f"Published settings as defaults of the other flags: {', '.join(PRESETS)}.",
    ),
]
WandbProject = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Log to this Weights & Biases project too; needs wandb installed."),
]
ValFraction = Annotated[
    float,
    typer.Option(
        min=0,
        max=0.9,
        help="Hold out the pairs of about this share of the prompts, the same ones in every run; loss and accuracy on "
        "them are logged as val/...",
        rich_help_panel=_HELD_OUT,
    ),
]
ValEvery = Annotated[
    int, typer.Option(min=1, help="Optimizer steps between two looks at them.", rich_help_panel=_HELD_OUT)
]
ValStates = Annotated[
    int,
    typer.Option(
        min=1,
        help="How many of their states are looked at, of as many pairs as possible, evenly over all directories.",
        rich_help_panel=_HELD_OUT,
    ),
]
ValidationPrompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Prompts, one a line: images of them, from fixed noise, are drawn into OUT/validation and TensorBoard. "
        "The VAE is loaded for each drawing, and for nothing else.",
        rich_help_panel=_VALIDATION,
    ),
]
ValidationEvery = Annotated[
    int,
    typer.Option(
        min=1,
        help="Optimizer steps between two drawings; there is one before the first step and one after the last.",
        rich_help_panel=_VALIDATION,
    ),
]
ValidationSamplingSteps = Annotated[
    int, typer.Option(min=1, help="DDIM steps of an image.", rich_help_panel=_VALIDATION)
]
ValidationGuidanceScale = Annotated[
    float, typer.Option(min=1, help="Classifier-free guidance; 1: none.", rich_help_panel=_VALIDATION)
]
